"""Fills the documents' tables and draws the plots from committed results: `python -m bench.report`.

A document's table stands between `<!-- bench:begin NAME -->` and `<!-- bench:end NAME -->`: README
has the short ones (bench/tables.py SHORT_TABLES), docs/benchmarks.md the others.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path

import pandas as pd

from bench.machine import REPOSITORY
from bench.plots import draw_bandwidth, draw_tensors, figures
from bench.run import RESULTS, Row
from bench.tables import MEMORY_BOUND_BYTES, SHORT_TABLES, TABLES, Results, conditions, where
from bench.trained import trained

BLOCK = "<!-- bench:begin {name} -->", "<!-- bench:end {name} -->"
FIRST = "summary"  # the first table of docs/benchmarks.md
DOCUMENTS = tuple(
    REPOSITORY / name
    for name in ("README.md", "docs/benchmarks.md", "docs/concepts/low-precision.md")
)


def load(folder: Path) -> list[Results]:
    """All whole results under `folder`: GPUs first, and of each kind the newest first."""
    found = []
    columns = [column.name for column in fields(Row)]  # of which older results lack some
    for path in sorted(folder.rglob("steps.csv")):
        if path.parent.suffix == ".partial":
            continue
        machine = json.loads((path.parent / "machine.json").read_text())
        rows = pd.read_csv(path).reindex(columns=columns)
        # Whether it moves more than the caches keep: elsewhere a bandwidth says nothing.
        moved = rows["gb_s"] * 1e3 * rows["device_us"].fillna(rows["step_us"])
        found.append(Results(machine, rows.assign(is_memory_bound=moved >= MEMORY_BOUND_BYTES)))
    found.sort(key=lambda results: str(results.machine["date"]), reverse=True)
    return sorted(found, key=lambda results: not results.on_gpu)


NO_GPU = """\
There are no GPU figures here yet: none has been measured. `make gpu` measures them, writes them
under `bench/results/`, and `make report` puts them into the tables. Until then, what is known of
the CUDA kernel is what can be known without a GPU: it is compiled for sm_80 and sm_90, its machine
code has 128-bit accesses and no local memory, and its source, run on the CPU under the address
sanitizer, gives the CPU kernel's bits."""
ABOUT_GRAPHS = "Steps replayed from a CUDA graph, beside the same steps called, whole steps both:"
ABOUT_THREADS = "What more threads of the CPU give:"


def blocks(results: list[Results]) -> dict[str, str]:
    """The text of each block: the table of every machine that has one, under the machine's name, in
    the first block under all conditions; of the short tables only the first machine's.
    """
    heads = {True: conditions, False: lambda r: f"{where(r)}."}
    tables = {name: [(r, make(r)) for r in results] for name, make in TABLES.items()}
    texts = {
        name: "\n\n".join(f"{heads[name == FIRST](r)}\n\n{text}" for r, text in of_block if text)
        for name, of_block in tables.items()
    }
    for name, make in SHORT_TABLES.items():
        texts[name] = next(filter(None, map(make, results)), "")
    if not any(r.on_gpu for r in results):
        texts["graph"] = NO_GPU
    for name, about in (("graph", ABOUT_GRAPHS), ("threads", ABOUT_THREADS)):
        if texts[name] and texts[name] != NO_GPU:
            texts[name] = f"{about}\n\n{texts[name]}"
    return texts


def insert(document: str, texts: dict[str, str]) -> str:
    """The document with each `bench:begin NAME` block filled anew.

    Raises ValueError for a block whose name is unknown or that has no end.
    """
    for name in re.findall(r"<!-- bench:begin (\S+) -->", document):
        if name not in texts:
            raise ValueError(f"no table is called {name!r}; there are: {', '.join(texts)}")
        begin, end = (mark.format(name=name) for mark in BLOCK)
        head, rest = document.split(begin, 1)
        if end not in rest:
            raise ValueError(f"{begin} has no {end}")
        tail = rest.split(end, 1)[1]
        document = f"{head}{begin}\n{texts[name]}\n{end}{tail}"
    return document


def main() -> None:
    """Reads the results, fills the documents' blocks, draws the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--documents", type=Path, nargs="*", default=DOCUMENTS)
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images")
    given = parser.parse_args()
    results = load(given.results)
    if not results:
        raise SystemExit(f"no results under {given.results}; `python -m bench.run` makes them")
    of_recipes = given.results / "recipes"
    texts = {
        **blocks(results),
        "trained": trained(of_recipes),
        "trained-short": trained(of_recipes, short=True),
    }
    filled = {}
    for path in given.documents:
        try:
            filled[path] = insert(path.read_text(), texts)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path}: {error}") from None
    for path, text in filled.items():
        path.write_text(text)
    given.images.mkdir(parents=True, exist_ok=True)
    figures(results, "sweep-tensors", draw_tensors, given.images / "tensors.png")
    figures(results, "sweep-elements", draw_bandwidth, given.images / "bandwidth.png")
    names = ", ".join(str(path) for path in filled)
    print(f"{len(results)} machines: tables in {names}, plots in {given.images}")


if __name__ == "__main__":
    main()
