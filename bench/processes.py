"""A process of its own for each case: what one leaves in caches, allocators and threads, and a
peer that crashes, do not meet the next.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from bench.cases import Case
from bench.competitors import Competitor
from bench.devices import DEVICES
from bench.measure import Effort, Result, Times, measure, threads_of


class Processes:
    """Forked from a server that has imported torch and the peers, and has done nothing else: a case
    then starts at once, and none begins with another's threads. Each imports warpstep by itself:
    where that is imported before a fork, it uses threads of its own and not torch's in the child.
    """

    def __init__(self, competitors: Sequence[Competitor]) -> None:
        self.context = multiprocessing.get_context("forkserver")
        peers = [c.module for c in competitors if c.module.split(".")[0] != "warpstep"]
        self.context.set_forkserver_preload(["torch", *dict.fromkeys(peers)])

    def measure(
        self,
        case: Case,
        competitors: Sequence[Competitor],
        device: str,
        *,
        effort: Effort,
        say: Callable[[str], None],
    ) -> Result:
        """As bench.measure.measure(). Where the process dies, nobody has times, for that reason."""
        receiver, sender = self.context.Pipe(duplex=False)
        arguments = (sender, case, competitors, device, effort)
        process = self.context.Process(target=_measure, args=arguments)
        process.start()
        sender.close()
        try:
            while not isinstance(message := receiver.recv(), Result):
                say(message)
        except EOFError:
            process.join()
            why = f"the case's process ended with exit code {process.exitcode}"
            return Result(case, {c.id: Times(left_out=why) for c in competitors})
        process.join()
        return message


def _measure(
    sender: Connection,
    case: Case,
    competitors: Sequence[Competitor],
    device: str,
    effort: Effort,
) -> None:
    """Measures a case and sends what it has to say on the way, and the result."""
    with threads_of(case):
        result = measure(case, competitors, DEVICES[device], effort=effort, say=sender.send)
    sender.send(result)
