"""A signal at any line of the package, whose handler raises: as Ctrl-C does."""

import signal
import sys
from pathlib import Path

import torch

import warpstep

PACKAGE = str(Path(warpstep.__file__).parent)


class InterruptionError(Exception):
    """What the tests' signal handler raises."""


def raise_interruption(_number, _frame):
    raise InterruptionError


def interrupted_at(line, call):
    """Runs ``call`` with a signal at the ``line``-th line that the package runs.

    Returns whether the signal came, and what the call raised.
    """
    lines, came = 0, False

    def at_call(frame, _event, _argument):
        return at_line if PACKAGE in frame.f_code.co_filename else None

    def at_line(_frame, event, _argument):
        nonlocal lines, came
        if event == "line":
            if lines == line:
                sys.settrace(None)
                came = True
                signal.raise_signal(signal.SIGUSR1)
            lines += 1
        return at_line

    raised = None
    had_grad = torch.is_grad_enabled()
    sys.settrace(at_call)
    try:
        call()
    except InterruptionError as error:
        raised = error
    finally:
        sys.settrace(None)
        # The line of a `with` is run again at its end, where the tracer can raise before it is
        # left, and a signal cannot.
        torch.set_grad_enabled(had_grad)
    return came, raised
