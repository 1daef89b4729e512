"""Compares two runs of the benchmark: `python -m bench.compare BEFORE AFTER`.

Each is a folder with a run's steps.csv (in build/bench or bench/results), or a commit, whose kept
results are meant. Runs are hours apart, and a machine has its moods: so what is compared is not a
time but how many times longer torch's fused step took in the same rounds, with the spread of both.
"""

from __future__ import annotations

import argparse
import io
import subprocess
from pathlib import Path

import pandas as pd

from bench.competitors import BASELINE
from bench.machine import REPOSITORY

KEPT = "bench/results"


def steps(source: str, machine: str | None) -> pd.DataFrame:
    """The lines of a run. Raises ValueError where there are none, or of several machines."""
    if (folder := Path(source)).is_dir():
        if not (folder / "steps.csv").is_file():
            raise ValueError(f"{folder} has no steps.csv: name a folder that bench.run wrote")
        return pd.read_csv(folder / "steps.csv")
    listed = _git("ls-tree", "-r", "--name-only", source, KEPT)
    found = {Path(f).parent.name: f for f in listed.split() if Path(f).name == "steps.csv"}
    if machine is None and len(found) == 1:
        machine = next(iter(found))
    if machine not in found:
        raise ValueError(f"{source} has results of {', '.join(found) or 'no machine'}: --machine")
    return pd.read_csv(io.StringIO(_git("show", f"{source}:{found[machine]}")))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"neither a folder nor a commit: {done.stderr.strip()}")
    return done.stdout


def compared(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """By case, torch's fused time over warpstep's before and after, and what became of it.

    `apart` says that the two spreads, from the 10th to the 90th percentile, have nothing in common.
    """
    columns = ["ratio", "ratio_p10", "ratio_p90"]

    def ratios(run: pd.DataFrame) -> pd.DataFrame:
        lines = run[(run["competitor"] == BASELINE) & run["ratio"].notna()]
        return lines.set_index("case")[columns]

    both = (
        ratios(before).add_suffix("_before").join(ratios(after).add_suffix("_after"), how="inner")
    )
    both["change"] = both["ratio_after"] / both["ratio_before"] - 1
    both["apart"] = (both["ratio_p10_after"] > both["ratio_p90_before"]) | (
        both["ratio_p90_after"] < both["ratio_p10_before"]
    )
    return both


def in_words(both: pd.DataFrame) -> str:
    """A line a case, those that changed most first."""
    lines = []
    for case, line in both.sort_values("change", key=abs, ascending=False).iterrows():
        spreads = (
            f"{line[f'ratio_{at}']:7.2f}x ({line[f'ratio_p10_{at}']:.2f} to "
            f"{line[f'ratio_p90_{at}']:.2f})"
            for at in ("before", "after")
        )
        mark = "*" if line["apart"] else " "
        lines.append(
            f"{case:<28} {'  ->  '.join(f'{s:<24}' for s in spreads)} {line['change']:+7.0%} {mark}"
        )
    lines.append("torch's fused time over warpstep's; * where the spreads have nothing in common")
    return "\n".join(lines)


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", help="a folder with steps.csv, or a commit")
    parser.add_argument("after", help="the same")
    parser.add_argument("--machine", help="whose kept results, where a commit has several")
    given = parser.parse_args()
    try:
        runs = [steps(source, given.machine) for source in (given.before, given.after)]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    both = compared(*runs)
    if both.empty:
        raise SystemExit(f"the two runs have no case in common that {BASELINE} was measured on")
    print(in_words(both))


if __name__ == "__main__":
    main()
