"""Studies made of many short trainings: worked off by several processes, resumed where they ended.

Each finished training is a row of the study's CSV at once. A second start trains only what is not
there yet, so an interruption costs no more than the trainings that were under way.
"""

from __future__ import annotations

import csv
import datetime
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import warpstep
from bench.experiments import pictures
from bench.machine import cpu_model

Run = dict[str, str | int | float]  # what is trained; its values tell it from all others


@dataclass(frozen=True)
class Budget:
    """How much is trained: `seeds` each, a `share` of the steps, every `every`th of a grid."""

    seeds: int
    share: float
    every: int

    def steps(self, full: int) -> int:
        """This budget's share of the full number of steps."""
        return max(4, round(self.share * full))

    def thinned(self, values: Iterable[float]) -> list[float]:
        """Some of a grid's values."""
        return list(values)[:: self.every]


FULL = Budget(seeds=3, share=1.0, every=1)
QUICK = Budget(seeds=1, share=0.1, every=2)


@dataclass(frozen=True)
class Study:
    """One experiment. `seconds` is about what a run takes on one core, for the progress bar."""

    name: str
    runs: Callable[[Budget, str], list[Run]]
    train: Callable[[Run], dict[str, float]]
    seconds: Callable[[Run], float]
    tables: Callable[[pd.DataFrame], dict[str, str]]
    plot: Callable[[pd.DataFrame, Path], None]

    def path(self, folder: Path) -> Path:
        """Its rows."""
        return folder / f"{self.name}.csv"

    def rows(self, folder: Path, wanted: list[Run]) -> pd.DataFrame:
        """The finished ones among the wanted runs; others, of an earlier budget, are left out."""
        path = self.path(folder)
        if not wanted or not path.exists():
            return pd.DataFrame()
        ids = {identity(run) for run in wanted}
        keys = list(wanted[0])
        texts = pd.read_csv(path, dtype=str, keep_default_na=False)
        kept = [identity({k: row[k] for k in keys}) in ids for _, row in texts.iterrows()]
        kinds = {name: type(wanted[0].get(name, 0.0)) for name in texts}
        rows = texts[kept].reset_index(drop=True)
        return rows.assign(**{name: rows[name].map(kind) for name, kind in kinds.items()})


def identity(run: Run) -> str:
    """The same for a run and for what its CSV row says of it."""
    return "/".join(f"{key}={value}" for key, value in run.items())


class Log:
    """A CSV that grows by a row a finished run and outlives being killed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole)

    def done(self, keys: Iterable[str]) -> set[str]:
        """The identities of its rows.

        Raises ValueError where it has other columns: an earlier version of the study wrote it.
        """
        if not self.path.exists() or not self.path.stat().st_size:
            return set()
        keys = list(keys)
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if list(reader.fieldnames or [])[: len(keys)] != keys:
                raise ValueError(
                    f"{self.path} has the columns {reader.fieldnames}; expected first {keys}: "
                    "another version of the study wrote it, so move it away"
                )
            return {identity({k: row[k] for k in keys}) for row in reader}

    def add(self, row: Run) -> None:
        """Appends a row; the first one brings the header."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def begin_worker(cifar10: Path | None) -> None:
    """One thread each, so that bits do not depend on how many work; Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    pictures.cifar10_folder = cifar10


def trained(study: Study, run: Run) -> Run:
    """A run with what came of it, numbers rounded to what they are good for.

    Raises RuntimeError, which names the run, for what fails in it.
    """
    try:
        found = study.train(run)
    except Exception as error:
        raise RuntimeError(f"{study.name}, {identity(run)}: {error}") from error
    return {**run, **{name: float(f"{value:.6g}") for name, value in found.items()}}


def missing(study: Study, folder: Path, wanted: list[Run]) -> list[Run]:
    """What has still to be trained: a whole seed before the next, and long runs first."""
    log = Log(study.path(folder))
    done = log.done(wanted[0]) if wanted else set()
    left = [run for run in wanted if identity(run) not in done]
    return sorted(left, key=lambda run: (run["seed"], -study.seconds(run)))


def describe(folder: Path) -> None:
    """machine.json: what the latest rows were made with."""
    about = {
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "warpstep": warpstep.__version__,
        "date": datetime.date.today().isoformat(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(about, indent=2) + "\n")


def work(
    studies: list[tuple[Study, list[Run]]], folder: Path, workers: int, cifar10: Path | None
) -> None:
    """Trains all runs, in one process without `workers`. KeyboardInterrupt leaves what is done."""
    describe(folder)
    logs = {study.name: Log(study.path(folder)) for study, _ in studies}
    jobs = [(study, run) for study, runs in studies for run in runs]
    seconds = sum(study.seconds(run) for study, run in jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    left = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, left, speed_estimate_period=900) as progress:
        bar = progress.add_task("", total=seconds, count=f"0/{len(jobs)}")
        for number, (study, run, row) in enumerate(results(jobs, workers, cifar10), start=1):
            logs[study.name].add(row)
            progress.update(
                bar,
                advance=study.seconds(run),
                description=study.name,
                count=f"{number}/{len(jobs)}",
            )


def results(
    jobs: list[tuple[Study, Run]], workers: int, cifar10: Path | None
) -> Iterator[tuple[Study, Run, Run]]:
    """Study, run and row of each job as it finishes."""
    if not workers:
        pictures.cifar10_folder = cifar10
        for study, run in jobs:
            yield study, run, trained(study, run)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, begin_worker, (cifar10,))
    try:
        asked: dict[Future[Run], tuple[Study, Run]] = {
            pool.submit(trained, study, run): (study, run) for study, run in jobs
        }
        for future in as_completed(asked):
            study, run = asked[future]
            yield study, run, future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
