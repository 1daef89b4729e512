"""Trains all that is missing, then writes tables and plots: `python -m bench.experiments`."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from bench.experiments import decay_maps, one_cycle, voronoi
from bench.experiments.page import write_page
from bench.experiments.pictures import CIFAR10, DIGITS
from bench.experiments.runs import FULL, QUICK, Study, missing, work
from bench.machine import REPOSITORY

STUDIES = {s.name: s for s in (decay_maps.STUDY, one_cycle.STUDY, voronoi.STUDY)}
RESULTS = REPOSITORY / "bench" / "results" / "experiments"
PAGE = REPOSITORY / "docs" / "experiments.md"
IMAGES = REPOSITORY / "docs" / "images" / "experiments"
SCRATCH = REPOSITORY / "build" / "experiments"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.experiments", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some minutes; into build/experiments")
    parser.add_argument("--only", choices=STUDIES, action="append", help="some of the studies")
    parser.add_argument("--cifar10", type=Path, help="train on its pictures: the folder with them")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--report", action="store_true", help="only tables and plots, no training")
    parser.add_argument("--plan", action="store_true", help="only say what is missing")
    given = parser.parse_args()
    if given.cifar10 and not (given.cifar10 / "data_batch_1").exists():
        parser.error(f"--cifar10 {given.cifar10}: expected data_batch_1 to 5 and test_batch there")
    return given


def main() -> None:
    """Trains, unless told only to report."""
    given = arguments()
    budget, data = (QUICK if given.quick else FULL), (CIFAR10 if given.cifar10 else DIGITS)
    out = SCRATCH if given.quick else RESULTS
    folder = out / data
    chosen: list[Study] = [STUDIES[name] for name in given.only or STUDIES]
    jobs = [(study, missing(study, folder, study.runs(budget, data))) for study in chosen]
    for study, left in jobs:
        minutes = sum(map(study.seconds, left)) / 60 / given.workers
        print(f"{study.name}: {len(left):,} trainings to do, some {minutes:.0f} minutes")
    if given.plan:
        return
    if not given.report and any(left for _, left in jobs):
        # Whoever ends it with kill ends its processes, too, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            work(jobs, folder, given.workers, given.cifar10)
        except KeyboardInterrupt:
            print(f"\nInterrupted. What is done stays in {folder}; start again to go on.")
            raise SystemExit(130) from None
    if given.quick:
        page, images = SCRATCH / "experiments.md", SCRATCH / "images"
        page.write_text(PAGE.read_text())
    else:
        page, images = PAGE, IMAGES
    write_page(page, images, out, list(STUDIES.values()), budget)
    print(f"Rows in {folder}, tables in {page}, plots in {images}")


if __name__ == "__main__":
    main()
