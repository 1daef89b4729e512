"""Signals that wait: what several Python statements write is written as a whole, or not begun."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal makes an enum of each answer, slowly
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from warpstep import backends

Handler = Callable[[int, FrameType | None], Any]
# How often memory may be short where handlers are put back: it may be so for good.
_MOST_SHORTAGES = 100


class _Gate:
    """Stands in for the handlers of signals: while it is closed, it keeps what comes."""

    def __init__(self) -> None:
        self.is_closed = True
        self.handlers: dict[int, Handler] = {}
        self.restarting: set[int] = set()  # signals that system calls go on after
        self.came: dict[int, FrameType | None] = {}

    def handle(self, number: int, frame: FrameType | None) -> Any:
        """The handler of every signal meanwhile."""
        if self.is_closed:
            self.came[number] = frame
            return None
        return self.handlers[number](number, frame)

    def put_up(self) -> None:
        """Takes the place of all handlers that are Python's: the others raise nothing."""
        module, _ = backends.native()
        for number in range(1, signal.NSIG):
            handler = _signal.getsignal(number)
            if callable(handler):
                if module is not None and module.restarts_calls(number):
                    self.restarting.add(number)
                self.handlers[number] = handler
                _signal.signal(number, self.handle)

    def take_down(self) -> None:
        """Puts the handlers back, then calls those whose signal came.

        A handler that is back may raise at once, which must not keep the others from coming back.
        """
        raised: BaseException | None = None
        shortages = 0
        try:
            to_restore = list(self.handlers)
            while (to_restore or self.came) and shortages < _MOST_SHORTAGES:
                try:
                    while to_restore:
                        number = to_restore[-1]
                        if _signal.getsignal(number) == self.handle:  # nobody has put up another
                            _signal.signal(number, self.handlers[number])
                            if number in self.restarting:  # which signal.signal() turns off
                                _signal.siginterrupt(number, False)
                        to_restore.pop()
                    while self.came:
                        number, frame = self.came.popitem()
                        self.handlers[number](number, frame)
                except BaseException as error:
                    raised = raised or error
                    shortages += isinstance(error, MemoryError)
        finally:
            self.is_closed = False  # also where it stays: then it passes on what comes
        if raised is not None:
            raise raised


@contextmanager
def deferred() -> Iterator[None]:
    """Python's signal handlers (Ctrl-C's, for one) run after the inside of the ``with``.

    Python runs handlers between the statements of the main thread, and what they raise would end a
    step half-way. Several signals of one number count as one, as they do in the kernel. In other
    threads no handler runs, and nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    gate = _Gate()
    try:
        gate.put_up()
        yield
    finally:
        gate.take_down()
