"""The comparison of two runs: by ratios, with their spread, of folders or of commits."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import compare  # noqa: E402


def run_of(**ratios):
    """The lines of a run: by case, the ratio with its 10th and 90th percentile."""
    names = ["case", "competitor", "ratio", "ratio_p10", "ratio_p90"]
    lines = [(case, "torch-fused", *ratio) for case, ratio in ratios.items()]
    lines += [(case, "warpstep", 1.0, 1.0, 1.0) for case in ratios]
    return pd.DataFrame(lines, columns=names)


def test_changes_are_of_ratios_and_marked_where_spreads_are_apart(tmp_path, monkeypatch, capsys):
    before = run_of(small=(10.0, 9.0, 11.0), large=(1.0, 0.9, 1.1), gone=(1.0, 1.0, 1.0))
    after = run_of(small=(15.0, 12.0, 17.0), large=(1.05, 0.95, 1.2), new=(1.0, 1.0, 1.0))
    both = compare.compared(before, after)
    assert list(both.index) == ["small", "large"]
    assert both["change"].tolist() == pytest.approx([0.5, 0.05])
    assert both["apart"].tolist() == [True, False]

    for name, run in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        run.to_csv(tmp_path / name / "steps.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    compare.main()
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("small")
    assert "+50% *" in first
    assert "+5%" in second
    assert "*" not in second


def test_what_cannot_be_compared_is_said(tmp_path, monkeypatch, capsys):
    run_of(one=(1.0, 1.0, 1.0)).to_csv(tmp_path / "steps.csv", index=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    run_of(two=(1.0, 1.0, 1.0)).to_csv(tmp_path / "other" / "steps.csv", index=False)
    for other, said in (
        ("no-such-commit-or-folder", "neither a folder nor a commit"),
        (str(tmp_path / "empty"), "has no steps.csv"),
        (str(tmp_path / "other"), "no case in common"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), other])
        with pytest.raises(SystemExit, match=said):
            compare.main()


@pytest.fixture
def kept():
    """The machines whose results the last commit keeps."""
    listed = subprocess.run(
        ["git", "ls-tree", "--name-only", "HEAD:bench/results"], cwd=ROOT, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("needs the repository's history")
    return [name for name in listed.stdout.decode().split() if name.startswith(("cpu-", "cuda-"))]


def test_a_commit_means_its_kept_results(kept):
    assert kept
    for machine in kept:
        both = compare.compared(compare.steps("HEAD", machine), compare.steps("HEAD", machine))
        assert len(both) > 20
        assert (both["change"] == 0).all()
        assert not both["apart"].any()


def test_of_several_machines_one_must_be_named(kept):
    if len(kept) == 1:
        assert compare.steps("HEAD", None).equals(compare.steps("HEAD", kept[0]))
    else:
        with pytest.raises(ValueError, match=f"{kept[0]}, .*--machine"):
            compare.steps("HEAD", None)
    with pytest.raises(ValueError, match="--machine"):
        compare.steps("HEAD", "a-machine-without-results")
