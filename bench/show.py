"""Shows a run while it goes on: a bar where rich is installed, plain lines where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ImportError:  # As on a machine that has a GPU and no network.
    Progress = None  # type: ignore[assignment, misc]


class Show:
    """Lines that stay, below them what is being done, how far all is and how long it still takes.

    `seconds` are what each of the cases is expected to take.
    """

    def __init__(self, seconds: Sequence[float]) -> None:
        self.bar = None
        self.seconds = seconds
        self.finished = 0
        if Progress is not None:
            text = TextColumn("{task.fields[finished]}/{task.fields[cases]} {task.description}")
            columns = (text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(highlight=False))
            total, cases = sum(seconds), len(seconds)
            self.task = self.bar.add_task("", total=total, finished=0, cases=cases)

    def __enter__(self) -> Show:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def doing(self, what: str) -> None:
        """Tells what is being done now."""
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def done(self, line: str) -> None:
        """Counts the next case as done, with a line that stays."""
        seconds = self.seconds[self.finished]
        self.finished += 1
        if self.bar is not None:
            self.bar.console.print(line, soft_wrap=True, markup=False)
            self.bar.update(self.task, advance=seconds, finished=self.finished)
        else:
            print(f"{self.finished}/{len(self.seconds)} {line}", flush=True)
