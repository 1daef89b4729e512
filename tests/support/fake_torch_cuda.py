"""torch.cuda as far as the benchmark and the stress test use it, where there is no GPU."""

import time
from contextlib import contextmanager, nullcontext

import torch


class Stream:
    """Where all runs at once, in order."""

    def __init__(self, device=None):
        self.waits = 0

    def wait_stream(self, other):
        self.waits += 1


class Event:
    """The host's clock when it was recorded."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Graph:
    """Holds what was called while it was captured, and calls it again."""

    capturing = None  # the one that is being captured

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


@contextmanager
def capture(graph, stream=None):
    assert Graph.capturing is None
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


def launched(call):
    """`call` as if it were a launch: it runs, or a graph that is being captured takes it."""

    def launch(*arguments):
        if Graph.capturing is None:
            call(*arguments)
        else:
            Graph.capturing.calls.append(lambda: call(*arguments))

    return launch


def install(monkeypatch):
    fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture}
    fakes |= {"current_stream": Stream, "stream": nullcontext, "synchronize": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
