"""What the design forbids, looked for in the files: who may know whom, and how large things get."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = [p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
CSRC = list((ROOT / "csrc").iterdir())
TESTS = list((ROOT / "tests").rglob("*.py"))
PYTHON = [*(ROOT / "python").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SUFFIXES = r"(?:cpp|cuh|cu|h|pyi|py)"
# Other projects' headers that comments name.
OTHERS = {"Python.h", "torch/csrc/inductor/aoti_torch/c/shim.h"}


def includes(path):
    return re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name)
def test_kernels_know_neither_python_nor_torch(path):
    for name in includes(path):
        assert not re.match(r"(torch|ATen|c10|pybind11|Python\.h)", name), name


@pytest.mark.parametrize("path", CSRC, ids=lambda p: p.name)
def test_csrc_knows_no_torch_cpp(path):
    for name in includes(path):
        assert not re.match(r"(torch|ATen|c10)/", name), name


def test_only_rules_have_formulas():
    """Square roots and multiply-adds stand in the rules and in arithmetic, of one and of many."""
    for path in [*NATIVE, *CSRC]:
        if path.parent.name != "rules" and path.name not in ("arithmetic.h", "vectors.h"):
            assert not re.search(r"sqrt|fma\(", path.read_text()), path.name


def test_setup_is_small():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", [*NATIVE, *CSRC, *PYTHON], ids=lambda p: p.name)
def test_files_say_what_they_are_for_and_stay_readable(path):
    lines = path.read_text().splitlines()
    assert re.match(r'(//|""").{20,}', lines[0]), lines[0]
    assert len(lines) <= 500
    assert max(map(len, lines)) <= 100


def test_no_test_module_imports_another():
    """What several need is in tests/support/. A program that a test starts may import its own."""
    for path in TESTS:
        imports = r"^\s*(?:from|import)\s.*?\b(test_\w+)"
        found = re.findall(imports, path.read_text(), re.MULTILINE)
        assert set(found) <= {path.stem}, path.name


def imported_modules(path):
    """The package's own modules that one imports anywhere, also in functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("warpstep"):
            module = node.module.partition(".")[2]
            found |= {module} if module else {name.name for name in node.names}
    return found


def test_imports_have_no_circles():
    """A file can be read with only what stands below it: there is an order of all modules."""
    package = ROOT / "python" / "warpstep"
    modules = {
        p: ".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("*.py")
    }
    names = {p: name.removesuffix(".__init__") for p, name in modules.items() if name != "__init__"}
    imports = {name: imported_modules(p) for p, name in names.items() if name[0] != "_"}
    assert imports["optimizer"] >= {"plan", "checkpoint"}  # they are found
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def files_in(folder):
    """Source files below a folder, relative to the repository."""
    found = (p for p in (ROOT / folder).rglob("*") if re.fullmatch(r"\." + SUFFIXES, p.suffix))
    return {str(p.relative_to(ROOT)) for p in found}


def listed_files():
    """The source files that docs/design.md lists, of each folder that it has a line for."""
    text = (ROOT / "docs" / "design.md").read_text()
    listing = re.search(r"## Where things are\n+```\n(.*?)```", text, re.DOTALL)[1]
    folders = {}
    for line in listing.splitlines():
        if not line.startswith(" "):
            root = folder = line.split()[0]
        elif not line.startswith("   "):
            entry = line.split()[0]
            folder = root + entry if entry.endswith("/") else root
        names = folders.setdefault(folder, set())
        for stem, suffixes in re.findall(rf"(\w+)((?:,? ?\.{SUFFIXES}\b)+)", line):
            names |= {folder + stem + suffix for suffix in re.findall(r"\.\w+", suffixes)}
    return folders


def test_the_design_lists_every_file():
    folders = listed_files()
    for folder in ("kernels/", "csrc/", "python/warpstep/"):
        listed = set().union(*(names for at, names in folders.items() if at.startswith(folder)))
        there = {path for path in files_in(folder) if Path(path).name != "__init__.py"}
        assert there - listed == set()


def test_files_that_are_named_exist():
    """In comments, docstrings and pages: by their path, or the end of it."""
    known = OTHERS | {path.name for path in ROOT.glob("*.py")}
    for folder in ("bench", "csrc", "docs", "examples", "kernels", "python", "tests"):
        for parts in (path.split("/") for path in files_in(folder)):
            known |= {"/".join(parts[i:]) for i in range(len(parts))}
    for path in {*NATIVE, *CSRC, *PYTHON, *PAGES}:
        text = re.sub(r"(?m)^\s*#\s*include.*", "", path.read_text())
        named = re.findall(rf"(?<![\w/.{{}}-])((?:[\w.-]+/)*[\w-]+\.{SUFFIXES})\b(?![\w/(])", text)
        missing = {re.sub(r"^(\.\./)+", "", name) for name in named} - known
        assert not missing, path
