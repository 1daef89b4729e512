"""Runs the benchmark and writes its results: `python -m bench.run --help`."""

from __future__ import annotations

import argparse
import csv
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from bench.cases import SHORT, Case, select
from bench.clocks import Clocks
from bench.competitors import OURS, Competitor, found, that_fit
from bench.copying import copied_bytes
from bench.machine import REPOSITORY, cores, describe, free_bytes, slug
from bench.measure import Effort, Result, Times, median, ratio, spread
from bench.processes import Processes
from bench.show import Show

RESULTS = REPOSITORY / "bench" / "results"  # Results to keep, which git tracks.
TRIALS = REPOSITORY / "build" / "bench"

FULL = Effort(least=7, most=41, seconds=2.0)
QUICK = Effort(least=3, most=21, seconds=0.7)

# Where other processes take more than this, a case's figures are not to be trusted.
BUSY_CORES = 0.1

# After the warm-up steps, rounding alone sets competitors less far apart than this in the mean.
SUSPICIOUS_DIFFERENCE_LR = 0.25


@dataclass
class Row:
    """One line of the results: one competitor on one case. Times are microseconds.

    `step_us` is the whole step, until its result is there; on CUDA `host_us` is what the Python
    thread pays and `device_us` what the GPU needs when the host is ahead (nothing where the
    launches do not fit its queue). `ratio` is this competitor's step time over that of the one
    `against` which it is measured, so above 1 that one is faster; `host_ratio` and `device_ratio`
    likewise. `gb_s` is the floor bytes over the device's time, on a CPU the step's; `copy_share`
    compares that time, round by round, with the copy loop's. `sm_mhz` is the GPU's clock meanwhile,
    its median, and `sm_mhz_min` its least. `difference_lr` is how far the parameters were from
    warpstep's after the warm-up steps, in the mean and in learning rates; `others_cores` how many
    cores other processes kept busy. Where `left_out` gives a reason, nothing was measured.
    """

    case: str
    family: str
    sequence: str
    recipe: str
    tensors: int
    groups: int
    elements: int
    competitor: str
    threads: int | None = None
    rounds: int = 0
    step_us: float | None = None
    step_us_p10: float | None = None
    step_us_p90: float | None = None
    step_us_mean: float | None = None
    host_us: float | None = None
    device_us: float | None = None
    against: str = ""
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    host_ratio: float | None = None
    device_ratio: float | None = None
    gb_s: float | None = None
    copy_gb_s: float | None = None
    copy_share: float | None = None
    copy_kind: str = ""
    sm_mhz: float | None = None
    sm_mhz_min: float | None = None
    difference_lr: float | None = None
    others_cores: float | None = None
    left_out: str = ""


def row(result: Result, competitor: Competitor, left_out: str | None = None) -> Row:
    """The line of one competitor."""
    case = result.case
    line = Row(
        case=case.id,
        family=case.family,
        sequence=case.sequence,
        recipe=SHORT[case.dtype],
        tensors=case.tensors,
        groups=case.groups,
        elements=case.elements,
        competitor=competitor.id,
        threads=case.threads,
    )
    times = result.times.get(competitor.id, Times())
    if not times.step:
        line.left_out = left_out or times.left_out or "no rounds"
        return line
    step = spread(times.step)
    assert step is not None
    line.rounds = len(times.step)
    line.step_us, line.step_us_p10, line.step_us_p90, line.step_us_mean = (
        t / 1e3 for t in (step.median, step.p10, step.p90, step.mean)
    )
    line.host_us, line.device_us = (
        None if of is None else of.median / 1e3 for of in map(spread, (times.host, times.device))
    )
    other = result.times.get(competitor.against)
    if other is not None and other.step:
        line.against = competitor.against
        if ratios := ratio(times.step, other.step):
            line.ratio, line.ratio_p10, line.ratio_p90 = ratios.median, ratios.p10, ratios.p90
        line.host_ratio = median(ratio(times.host, other.host))
        line.device_ratio = median(ratio(times.device, other.device))
    moving = times.device or times.step
    moved_in = spread(moving)
    if competitor.same_formats and case.moves_the_floor and moved_in:
        line.gb_s = case.floor_bytes / moved_in.median
        if copied_in := spread(result.copy):
            line.copy_gb_s = case.floor_bytes / copied_in.median
            line.copy_share = median(ratio(result.copy, moving))
            line.copy_kind = result.copy_kind
    line.sm_mhz, line.sm_mhz_min = result.sm_mhz
    line.difference_lr = times.difference_lr
    line.others_cores = result.others_cores
    return line


def write(path: Path, rows: list[Row]) -> None:
    """Writes all lines so far; figures keep five digits, which is more than they are worth."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in fields(Row)])
        for line in rows:
            values = asdict(line).values()
            writer.writerow(
                [f"{float(f'{v:.5g}'):.12g}" if isinstance(v, float) else v for v in values]
            )


def in_words(case: Case, rows: list[Row]) -> str:
    """One case's outcome as a line for the terminal."""
    by_id = {line.competitor: line for line in rows if line.step_us is not None}
    ours = by_id.pop(OURS, None)
    if ours is None or ours.step_us is None:
        reasons = ", ".join(line.left_out for line in rows if line.competitor == OURS)
        return f"{case.id}: warpstep was not measured: {reasons}"
    share = f"{ours.copy_share:.0%} of copy" if ours.copy_share and case.is_memory_bound else ""
    if ours.device_us is not None and ours.host_us is not None:
        share = f"host {ours.host_us:,.0f}, device {ours.device_us:,.1f} us {share:>12}"
    others = [
        f"{name.removeprefix('torch-')} {line.ratio:.2f}x"
        for name, line in by_id.items()
        if line.ratio is not None
    ]
    line = f"{case.id:<23} {ours.step_us:>11,.1f} us {share:>13}  {'  '.join(others)}"
    busy = ours.others_cores is not None and ours.others_cores > BUSY_CORES
    return f"{line}  (disturbed: {ours.others_cores:.1f} cores busy elsewhere)" if busy else line


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    on_cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=on_cuda)
    parser.add_argument("--quick", action="store_true", help="a few cases, in about a minute")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="cases whose id matches, such as 'gpt2-*'; may be repeated",
    )
    parser.add_argument("--rounds", type=int, help="rounds a case, instead of a time budget")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--commit", help="the commit measured, where there is no .git to tell it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--record",
        action="store_true",
        help="write into bench/results, for the documents, not build/bench",
    )
    where.add_argument("--out", type=Path, help="folder for the results")
    parsed = parser.parse_args()
    if parsed.record and (parsed.quick or parsed.only):
        parser.error("--record is for whole runs, without --quick and --only")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if parsed.rounds is not None and parsed.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {parsed.rounds}")
    return parsed


def expected_seconds(case: Case, competitors: list[Competitor], given: argparse.Namespace) -> float:
    """About how long a case takes: what two CPU cores and a large GPU need, to a factor of two."""
    device = given.device
    joining = [c for c in competitors if c.declines(case, device) is None]
    compiling = sum(c.compiled for c in joining) and not given.quick
    an_element, a_tensor = (25e-9, 3e-4) if device == "cpu" else (1e-9, 1e-4)
    steps = len(joining) * (case.elements * an_element + case.tensors * a_tensor)
    return (1 if given.quick else 2.5) + steps * (0.5 if given.quick else 1) + 30 * compiling


def run_case(
    case: Case,
    competitors: list[Competitor],
    given: argparse.Namespace,
    processes: Processes,
    show: Show,
    clocks: Clocks,
) -> list[Row]:
    """Measures one case."""
    device: str = given.device
    declined = {c.id: c.declines(case, device) for c in competitors}
    if given.quick:
        declined |= {c.id: "takes too long for --quick" for c in competitors if c.compiled}
    willing = [c for c in competitors if declined[c.id] is None]
    copied = copied_bytes(case) if device == "cuda" else 0
    kept, too_many = that_fit(willing, case, free_bytes(device) - copied)
    declined |= {c.id: "no memory left for its copy" for c in too_many}
    effort = QUICK if given.quick else FULL
    if given.rounds is not None:
        effort = Effort(given.rounds, given.rounds, 0)
    first = clocks.count()
    result = processes.measure(
        case, kept, device, effort=effort, say=lambda what: show.doing(f"{case.id}: {what}")
    )
    if (sm := clocks.summary(first).get("clocks.sm MHz")) is not None:
        result.sm_mhz = sm["median"], sm["min"]
    return [row(result, c, declined[c.id]) for c in competitors]


def main() -> None:
    """Measures the cases asked for, writing the results after each."""
    given = arguments()
    try:
        cases = select(given.device, given.quick, tuple(given.only), cores())
    except ValueError as error:
        raise SystemExit(str(error)) from None
    competitors, absent = found(given.device)
    if OURS in absent:
        raise SystemExit(f"warpstep cannot be imported ({absent[OURS]}); `pip install .` first")

    machine = describe(given.device, given.commit) | {"absent": absent}
    # A partial run goes beside a whole one.
    partial = ".partial" if given.quick or given.only else ""
    folder = given.out or (RESULTS if given.record else TRIALS) / (slug(machine) + partial)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")

    print(f"{machine['name']}, {machine['cores']} cores, torch {machine['torch']}")
    print(f"warpstep {machine['warpstep']} on its {machine['backend']} backend")
    print(f"Measured: {', '.join(c.id for c in competitors)}")
    print(f"Not installed: {', '.join(absent) or 'none'}")
    seconds = [expected_seconds(case, competitors, given) for case in cases]
    print(
        f"{len(cases)} cases, about {max(1, round(sum(seconds) / 60))} min on an idle machine, "
        "which it should be."
    )
    print("warpstep's time, then how many times longer each of the others takes:")
    rows: list[Row] = []
    start = time.monotonic()
    processes = Processes(competitors)
    clocks = Clocks(folder / "clocks.csv")
    with Show(seconds) as show, clocks if given.device == "cuda" else nullcontext():
        for case in cases:
            if given.minutes and time.monotonic() - start > 60 * given.minutes:
                lines = [row(Result(case, {}), c, "no time left") for c in competitors]
            else:
                lines = run_case(case, competitors, given, processes, show, clocks)
            rows.extend(lines)
            write(folder / "steps.csv", rows)
            show.done(in_words(case, lines))
            if found_clocks := clocks.summary():
                machine["clocks"] = found_clocks
                (folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    for line in rows:
        if line.difference_lr is not None and line.difference_lr > SUSPICIOUS_DIFFERENCE_LR:
            print(
                f"{line.competitor} on {line.case}: parameters end {line.difference_lr:.2g} "
                "learning rates from warpstep's in the mean; one of the two computes something else"
            )
    if folder.is_relative_to(RESULTS):
        print(f"Written to {folder}; `make report` makes the documents' tables and plots of it.")
    else:
        print(f"Written to {folder}; --record writes results to keep into {RESULTS}.")


if __name__ == "__main__":
    main()
