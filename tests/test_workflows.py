"""The workflows of GitHub Actions, as far as they can be looked at without GitHub."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has none")


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path):
    return [step for job in jobs(path).values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_fit_the_schema(path):
    """Of check-jsonschema, which has GitHub's schema in itself."""
    pytest.importorskip("check_jsonschema")
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_are_bash_and_make_knows_their_targets(path):
    makefile = (ROOT / "Makefile").read_text()
    scripts = [step["run"] for step in steps(path) if "run" in step]
    assert scripts
    for script in scripts:
        assert "${{" not in script  # which would paste text of others into a script
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for target in re.findall(r"^make ([a-z-]+)", script, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_only_who_publishes_may_write(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert name == "publish" or "permissions" not in job, name


def test_what_is_published_needs_everything_that_was_built():
    of_wheels = jobs(ROOT / ".github" / "workflows" / "wheels.yml")
    assert set(of_wheels["publish"]["needs"]) == set(of_wheels) - {"publish"}
    assert of_wheels["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"


def test_ci_has_both_architectures_with_the_oldest_and_the_newest_versions():
    pyproject = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'dependencies = \["torch>=([\d.]+)"\]', pyproject)
    (triton,) = re.findall(r'triton = \["triton>=([\d.]+)"\]', pyproject)
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', pyproject)
    tests = jobs(ROOT / ".github" / "workflows" / "ci.yml")["test"]["strategy"]["matrix"]["include"]
    for runner in {test["runner"] for test in tests}:
        versions = {test["versions"] for test in tests if test["runner"] == runner}
        assert versions >= {f"TORCH=torch=={oldest}.* TRITON=triton=={triton}.*", "TORCH=torch"}
    assert {test["runner"].removeprefix("ubuntu-24.04") for test in tests} == {"", "-arm"}
    assert python in {test["python"] for test in tests}


def test_issues_are_asked_for_the_report():
    forms = {path.name: path.read_text() for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")}
    for name in ("bug.yml", "feature.yml"):
        assert "python -m warpstep" in forms[name]
    bug = {field["id"]: field for field in yaml.safe_load(forms["bug.yml"])["body"]}
    assert bug["status"]["validations"]["required"]
