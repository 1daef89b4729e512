"""Shows a run while it goes on: a bar where rich is installed, plain lines where it is not."""

from __future__ import annotations

from types import TracebackType

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )
except ImportError:  # As on a machine that has a GPU and no network.
    Progress = None  # type: ignore[assignment, misc]


class Show:
    """Lines that stay, below them what is being done and how far it is."""

    def __init__(self, total: int) -> None:
        self.bar = None
        if Progress is not None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            console = Console(highlight=False)
            self.bar = Progress(*columns, TimeElapsedColumn(), console=console)
            self.task = self.bar.add_task("", total=total)

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
        """Counts one of the total as done, with a line that stays."""
        if self.bar is not None:
            self.bar.console.print(line, soft_wrap=True, markup=False)
            self.bar.advance(self.task)
        else:
            print(line, flush=True)
