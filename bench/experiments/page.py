"""Fills the tables of docs/experiments.md and draws its plots from the rows that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.experiments.pictures import CIFAR10, DIGITS
from bench.experiments.runs import Budget, Study
from bench.report import insert

NOT_YET = "*Not run yet: `make experiments` fills this in.*"
TITLES = {DIGITS: "digits", CIFAR10: "CIFAR-10"}


def conditions(folder: Path) -> str:
    """What the rows were made with, in a sentence; empty where none were."""
    path = folder / "machine.json"
    if not path.exists():
        return ""
    m = json.loads(path.read_text())
    return f"{m['cpu']}, torch {m['torch']}, warpstep {m['warpstep']}, {m['date']}."


def write_page(
    page: Path, images: Path, results: Path, studies: list[Study], budget: Budget
) -> None:
    """Fills every block of the page; one without rows says that its study was not run yet."""
    document = page.read_text()
    texts = dict.fromkeys(re.findall(r"<!-- bench:begin (\S+) -->", document), "")
    for data, title in TITLES.items():
        for study in studies:
            wanted = study.runs(budget, data)
            rows = study.rows(results / data, wanted)
            if rows.empty:
                continue
            done = f"{len(rows):,} of {len(wanted):,} trainings are done. "
            about = f"{done if len(rows) < len(wanted) else ''}{conditions(results / data)}"
            images.mkdir(parents=True, exist_ok=True)
            name = study.name if data == DIGITS else f"{study.name}-{data}"
            study.plot(rows, images / f"{name}.png")
            made = study.tables(rows)
            made[f"{study.name}-conditions"] = about
            made[f"{study.name}-plot"] = f"![{study.name}](images/experiments/{name}.png)"
            for block, text in made.items():
                heading = f"On {title}:\n\n" if data != DIGITS else ""
                texts[block] = "\n\n".join(filter(None, (texts.get(block, ""), heading + text)))
    page.write_text(insert(document, {name: text or NOT_YET for name, text in texts.items()}))
