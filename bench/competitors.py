"""Who is measured: torch's ways to run AdamW and SGD, the peers found installed, and warpstep."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import sequences
from bench.cases import RECIPES, Case
from bench.sequences import Step

Groups = list[dict[str, Any]]

BASELINE = "torch-fused"
OURS = "warpstep"
TRITON = "warpstep-triton"
OUR_GRAPH, BASELINE_GRAPH = f"{OURS}-graph", f"{BASELINE}-graph"  # Replayed, not called.
PLAIN = "warpstep-plain"  # The step alone, beside a sequence of more.

LR = 1e-3
HYPERS: dict[str, dict[str, Any]] = {
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "SGD": {"momentum": 0.9},
}


@dataclass(frozen=True)
class Competitor:
    """One implementation of AdamW, or of what else a case is of, behind torch's interface.

    `module` must be importable and hold `name`, a class with torch's `lr`, `betas`, `eps` and
    `weight_decay`; `options` are its own. `dtypes` are those for which its moments have the
    parameter's format, as torch's do. `same_formats` is False where they never do: it is then
    measured on the cases that name it, on its time and not its bandwidth. `sequences`
    are those it knows beside the step. With `graph`, its step is captured in a CUDA graph and
    replayed. Its times are compared with those of the competitor `against`. Of `optimizers` beside
    AdamW it has a class of that name.
    """

    id: str
    module: str
    name: str
    options: tuple[tuple[str, object], ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compiled: bool = False
    graph: bool = False
    against: str = OURS
    same_formats: bool = True
    sequences: tuple[str, ...] = ("step",)
    optimizers: tuple[str, ...] = ("AdamW",)

    def absent(self) -> str | None:
        """Why it cannot be imported here, in one line; None if it can."""
        try:
            getattr(importlib.import_module(self.module), self.name)
        except Exception as error:  # A peer's import can fail in any way that its binary can.
            return one_line(error)
        return None

    def declines(self, case: Case, device: str) -> str | None:
        """Why it does not run this case, in one line; None if it does."""
        if device not in self.devices:
            return f"has no {device} implementation"
        if case.dtype not in self.dtypes:
            return f"keeps other formats than {case.dtype}"
        if case.optimizer not in self.optimizers:
            return f"is not measured with {case.optimizer}"
        if case.sequence not in self.sequences:
            return f"is not measured on {case.sequence}"
        if (case.only or not self.same_formats) and self.id not in case.only:
            return f"is not measured on {case.id}"
        if self.compiled and device not in case.compiled_on:
            return f"not among those compiled on {device}"
        return None

    def build(self, groups: Groups, case: Case) -> tuple[torch.optim.Optimizer, Step]:
        """An optimizer of these groups, and the case's sequence over them, ready to be called."""
        sequence, hypers = case.sequence, HYPERS[case.optimizer]
        if sequence in sequences.ENABLED and self.id != PLAIN:
            enabled: torch.optim.Optimizer = getattr(torch.optim, case.optimizer)(
                groups, lr=LR, fused=sequences.ENABLED[sequence], **hypers
            )
            return enabled, enabled.step
        params = [param for group in groups for param in group["params"]]
        more = sequences.options(sequence, params) if self.id == OURS else {}
        if case.recipe and self.id == OURS:
            options = dict(RECIPES[case.recipe].options)
            more |= {name: getattr(torch, word, word) for name, word in options.items()}
        name = self.name if case.optimizer == "AdamW" else case.optimizer
        kind = getattr(importlib.import_module(self.module), name)
        optimizer = kind(groups, lr=LR, **hypers, **dict(self.options), **more)
        if self.compiled:
            torch._logging.set_logs(dynamo=logging.ERROR)
            return optimizer, torch.compile(optimizer.step)
        if self.id == PLAIN:
            return optimizer, optimizer.step
        of = sequences.ours if self.id == OURS else sequences.torchs
        return optimizer, of(sequence, optimizer)

    def bytes_for(self, case: Case) -> int:
        """Of its own copy of a case: with a graph, gradients too, which stay where they are."""
        return case.state_bytes + (case.param_bytes if self.graph else 0)


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:120]}"


F32 = ("float32",)
CUDA = ("cuda",)
WITH_SGD = ("AdamW", "SGD")

# In the order in which they are kept when memory is too short for all.
COMPETITORS: tuple[Competitor, ...] = (
    Competitor(
        OURS,
        "warpstep",
        "AdamW",
        sequences=tuple(sequences.IN_WORDS),
        optimizers=WITH_SGD,
    ),
    Competitor(
        BASELINE,
        "torch.optim",
        "AdamW",
        (("fused", True),),
        sequences=("step", "clip", "tail", "copies", *sequences.ENABLED),
        optimizers=WITH_SGD,
    ),
    Competitor(
        TRITON, "warpstep", "AdamW", (("backend", "triton"),), devices=CUDA, optimizers=WITH_SGD
    ),
    Competitor(OUR_GRAPH, "warpstep", "AdamW", (("capturable", True),), devices=CUDA, graph=True),
    Competitor(
        BASELINE_GRAPH,
        "torch.optim",
        "AdamW",
        (("fused", True), ("capturable", True)),
        devices=CUDA,
        graph=True,
        against=OUR_GRAPH,
    ),
    Competitor(PLAIN, "warpstep", "AdamW", sequences=("clip", "tail", "stats", *sequences.ENABLED)),
    Competitor("torch-foreach", "torch.optim", "AdamW", (("foreach", True),), optimizers=WITH_SGD),
    Competitor("torch-forloop", "torch.optim", "AdamW", (("foreach", False),), optimizers=WITH_SGD),
    Competitor("torch-compiled", "torch.optim", "AdamW", (("foreach", True),), compiled=True),
    Competitor("optimi", "optimi", "AdamW", (("kahan_sum", False),)),
    Competitor(
        "deepspeed-cpu",
        "deepspeed.ops.adam",
        "DeepSpeedCPUAdam",
        devices=("cpu",),
        dtypes=F32,
        sequences=("step", "copies"),
    ),
    Competitor("apex", "apex.optimizers", "FusedAdam", devices=CUDA, dtypes=F32),
    Competitor(
        "transformer-engine",
        "transformer_engine.pytorch.optimizers",
        "FusedAdam",
        devices=CUDA,
        dtypes=F32,
    ),
    Competitor("bitsandbytes", "bitsandbytes.optim", "AdamW", devices=CUDA, dtypes=F32),
    Competitor("bitsandbytes-8bit", "bitsandbytes.optim", "AdamW8bit", same_formats=False),
    Competitor("torchao-8bit", "torchao.optim", "AdamW8bit", same_formats=False),
)


def found(device: str) -> tuple[list[Competitor], dict[str, str]]:
    """The competitors that import here, and for those of `device` that do not, the reason."""
    present: list[Competitor] = []
    absent: dict[str, str] = {}
    for competitor in COMPETITORS:
        if device not in competitor.devices:
            continue
        reason = competitor.absent()
        if reason is None:
            present.append(competitor)
        else:
            absent[competitor.id] = reason
    return present, absent


def that_fit(
    competitors: Sequence[Competitor], case: Case, free_bytes: int
) -> tuple[list[Competitor], list[Competitor]]:
    """Those whose own copies of the case fit into memory together, first come first kept, and the
    others.

    Beside the copies, memory must hold two sets of gradients, the temporaries of one foreach step,
    which are as large as the parameters, twice, and 1 GiB for what else there is.
    """
    room = free_bytes - 4 * case.param_bytes - 2**30
    kept: list[Competitor] = []
    for competitor in competitors:
        room -= competitor.bytes_for(case)
        if room < 0:
            break
        kept.append(competitor)
    return kept, list(competitors[len(kept) :])
