"""The instructions of a kernel, and the ways through its loops, as they were read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

FLOAT64_ARITHMETIC = ("DADD", "DMUL", "DFMA")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    guard: str  # the predicate under which it acts, or nothing
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def kind(self) -> str:
        """The operation, without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found.group(1), 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        always = not self.guard and not re.match(r"!?U?P", self.operands)
        always = always and self.opcode != "BRA.DIV"  # where a warp's threads have parted
        return not (always and self.kind in ("BRA", "EXIT", "RET"))

    @property
    def moves_16_bytes(self) -> bool:
        """Whether it loads or stores 16 bytes of global memory."""
        return ".128" in self.opcode and self.kind in ("LDG", "STG")

    @property
    def moves_less(self) -> bool:
        """Whether it loads or stores fewer bytes."""
        return self.kind in ("LDG", "STG", "LD", "ST") and ".128" not in self.opcode


class Path(NamedTuple):
    """What a way through a loop does: 16-byte loads and stores, float64 operations, any root."""

    loads: int
    stores: int
    float64: int
    roots: bool


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: from the target of backward branches to the last of these."""

    code: tuple[Instruction, ...]

    @cached_property
    def following(self) -> list[list[int]]:
        """By instruction, those that may come after it; 0 is the loop's next turn."""
        index = {instruction.address: i for i, instruction in enumerate(self.code)}
        found = []
        for i, code in enumerate(self.code):
            to = None if code.target is None else index.get(code.target)
            after = [i + 1] if code.goes_on and i + 1 < len(self.code) else []
            found.append(after + ([to] if to is not None and (to > i or to == 0) else []))
        return found

    @property
    def closes(self) -> bool:
        """Whether a way leads from the first instruction to a branch back to it. Code that stands
        apart, for threads that have parted, also jumps back, but to somewhere in a loop.
        """
        reached = {0}
        for i, following in enumerate(self.following):
            if i in reached:
                reached.update(following)
                if 0 in following:
                    return True
        return False

    @cached_property
    def paths(self) -> dict[Path, int]:
        """Every kind of way through the loop, and the instructions of the shortest of that kind:
        what is there for rare operands only is then not counted.
        """
        ways: list[dict[Path, int]] = [{} for _ in self.code]
        for i in range(len(self.code) - 1, -1, -1):
            code = self.code[i]
            after: dict[Path, int] = {}
            for j in self.following[i]:
                for path, count in ({Path(0, 0, 0, False): 0} if j == 0 else ways[j]).items():
                    after[path] = min(count, after.get(path, count))
            wide = code.kind in FLOAT64_ARITHMETIC
            if not (wide or code.moves_16_bytes or code.kind == "MUFU"):  # as most: quickly
                ways[i] = {path: count + 1 for path, count in after.items()}
                continue
            load, store = (code.moves_16_bytes and code.kind == kind for kind in ("LDG", "STG"))
            # What is under a condition may be done or not.
            for done in {True, not (code.guard and code.moves_16_bytes)}:
                for path, count in after.items():
                    here = Path(
                        path.loads + (done and load),
                        path.stores + (done and store),
                        path.float64 + wide,
                        path.roots or code.kind == "MUFU",
                    )
                    ways[i][here] = min(count + 1, ways[i].get(here, count + 1))
        return ways[0]

    def shortest(self, loads: int, stores: int, float64: bool) -> int:
        """Instructions of the shortest way with so many 16-byte accesses, and all of the loop's
        float64 operations or the fewest; where the rule has roots, of one that takes the step.
        """
        takes_roots = any(path.roots for path in self.paths)
        found: dict[int, int] = {}
        for path, count in self.paths.items():
            if (path.loads, path.stores, path.roots) == (loads, stores, takes_roots):
                found[path.float64] = min(count, found.get(path.float64, count))
        return found[max(found) if float64 else min(found)]
