"""What nvcc made of the CUDA kernels: registers, blocks that fit, instructions an element.

    python -m bench.machine_code [FILE] [--architecture sm_90]

FILE is a native module or a cubin; without it, the installed module. Nothing is run, and no GPU is
needed: the machine code is read with cuobjdump. tests/test_cuda_code.py holds the kernels to it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File

from bench.control_flow import Instruction, Loop

FORMAT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Of the kernels through tiles, by their number in kernels/layout.h.
FORMATS = [
    "none",
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "int16",
    "uint8",
    "bfloat16_stochastic",
    "e4m3",
    "ue5m3",
]
TILED_BYTES = {
    **FORMAT_BYTES,
    "none": 0,
    "int16": 2,
    "bfloat16_stochastic": 2,
    "e4m3": 1,
    "ue5m3": 1,
}
BLOCK = 64  # numbers of 8 bits that share a byte of scale
# Of an H200: instructions of a thread a second, four schedulers of 132 multiprocessors giving 32
# threads one each at 1.98 GHz; and bytes a second.
INSTRUCTIONS = 132 * 4 * 32 * 1.98e9
BYTES = 4.3e12
THREADS = 256  # kCudaThreads
REGISTERS = 65536  # of a multiprocessor, of any GPU since 5.0
WARPS = {"sm_75": 32, "sm_86": 48, "sm_89": 48, "sm_120": 48}  # of a multiprocessor, where not 64


def find_cuobjdump() -> str | None:
    """The path of cuobjdump: that of Triton's wheel, or the one on PATH."""
    try:
        from triton import backends
    except ImportError:
        return shutil.which("cuobjdump")
    wheel = File(backends.__file__ or "").parent / "nvidia" / "bin" / "cuobjdump"
    return str(wheel) if wheel.exists() else shutil.which("cuobjdump")


def missing_tool() -> str | None:
    """What is needed to read machine code and is not there, in words."""
    if find_cuobjdump() is None:
        return "cuobjdump (Triton's wheel has one)"
    return None if shutil.which("c++filt") else "c++filt"


@dataclass(frozen=True)
class Kernel:
    """One kernel as it was compiled for one architecture."""

    architecture: str
    name: str
    registers: int
    shared_bytes: int
    text: str

    @cached_property
    def code(self) -> tuple[Instruction, ...]:
        """The instructions, in their order."""
        line = r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);"
        return tuple(
            Instruction(int(address, 16), guard, opcode, operands.strip())
            for address, guard, opcode, operands in re.findall(line, self.text)
        )

    @cached_property
    def opcodes(self) -> str:
        """Those of the instructions, one a line: a twentieth of the text to search."""
        return "\n".join(c.opcode for c in self.code)

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost loops: what lies between a jump back and where it goes."""
        branches = [(c.target, c.address) for c in self.code if c.kind == "BRA"]
        ends = {to: address for to, address in branches if to is not None and to < address}
        addresses = [c.address for c in self.code]
        found = [
            Loop(self.code[bisect_left(addresses, start) : bisect_right(addresses, end)])
            for start, end in ends.items()
        ]
        return [loop for loop in found if loop.closes]

    @cached_property
    def hot_loop(self) -> Loop:
        """The loop over aligned elements, which moves the fewest of them by themselves."""
        found = [loop for loop in self.loops if any(c.moves_16_bytes for c in loop.code)]
        return min(found, key=lambda loop: (sum(c.moves_less for c in loop.code), len(loop.code)))

    @property
    def warps(self) -> int:
        """Warps of this kernel that a multiprocessor holds, by registers."""
        of_a_warp = -(-self.registers // 8) * 8 * 32
        blocks = REGISTERS // (of_a_warp * THREADS // 32)
        return min(blocks * THREADS // 32, WARPS.get(self.architecture, 64))

    @property
    def is_step(self) -> bool:
        """Whether it is a kernel of the step."""
        return "step_kernel" in self.name

    @property
    def is_tiled(self) -> bool:
        """Whether it is a kernel of the step through tiles."""
        return "tile_kernel" in self.name

    @property
    def is_norm(self) -> bool:
        """Whether it is a kernel of the gradients' norm."""
        return "grad_norm_kernel" in self.name

    @cached_property
    def recipe(self) -> Recipe:
        """What the kernel is built for, by its name."""
        flag = r"\(?(?:bool\))?(true|false|0|1)"
        found = rf"step_kernel<.*Recipe<.*?(\w+)<{flag}>, (.+?)>, {flag}>"
        match = re.search(found, self.name)
        assert match is not None, self.name
        rule, _, formats, tail = match.groups()
        param, grad, *moments = [part.split("::")[-1] for part in formats.split(", ")]
        return Recipe(rule, param, grad, tuple(moments), tail in ("true", "1"))

    @cached_property
    def tiled(self) -> Tiled:
        """What a kernel through tiles is built for, by its name."""
        flag = r"\(?(?:bool\))?(true|false|0|1)"
        found = rf"tile_kernel<.*?(\w+)<{flag}>, .*?(Any|These)Formats(?:<(.+?)>)?, {flag}>"
        match = re.search(found, self.name)
        assert match is not None, self.name
        rule, more, _, numbers, tail = match.groups()
        formats = [FORMATS[int(n)] for n in re.findall(r"\)(\d+)", numbers or "")]
        moments = tuple(formats[4:])
        return Tiled(
            rule,
            more in ("true", "1"),
            *(formats[:4] or [None] * 4),
            moments,
            tail in ("true", "1"),
        )


@dataclass(frozen=True)
class Tiled:
    """What a kernel through tiles is built for: any formats (None), or these. ``more``: AMSGrad of
    AdamW, momentum of Sgd.
    """

    rule: str
    more: bool
    param: str | None
    residual: str | None
    grad: str | None
    copy: str | None
    moments: tuple[str, ...]
    tail: bool

    @property
    def label(self) -> str:
        """As the table names it."""
        if self.param is None:
            more = {"AdamW": ", amsgrad", "Sgd": ", momentum"}[self.rule] if self.more else ""
            return f"{self.rule} of any formats{more}" + ("; tail" if self.tail else "")
        text = self.param + (" with a residual" if self.residual == "int16" else "")
        text += f", {self.grad} gradients" if self.grad != self.param.split("_")[0] else ""
        text += f", {' and '.join(dict.fromkeys(self.moments))} moments"
        return text + (f", {self.copy} copy" if self.copy != "none" else "")

    @property
    def bytes(self) -> float:
        """Bytes an element that the plain step reads and writes."""
        kept = (self.param, self.residual, *self.moments)
        bytes_kept = sum(TILED_BYTES[f or "none"] for f in kept)
        scales = sum(f in ("e4m3", "ue5m3") for f in self.moments) / BLOCK
        read, written = (TILED_BYTES[f or "none"] for f in (self.grad, self.copy))
        return 2 * (bytes_kept + scales) + read + written

    @property
    def accesses(self) -> tuple[int, int]:
        """16-byte loads and stores of eight elements: of operands that have so many bytes."""
        stored = (self.param, self.residual, *self.moments)
        kept = sum(TILED_BYTES[f or "none"] // 2 for f in stored)
        return kept + TILED_BYTES[self.grad or "none"] // 2, kept + TILED_BYTES[
            self.copy or "none"
        ] // 2


@dataclass(frozen=True)
class Recipe:
    """A rule, formats of parameter, gradient and moments, and whether with the tail."""

    rule: str
    param: str
    grad: str
    moments: tuple[str, ...]
    tail: bool

    @property
    def label(self) -> str:
        """As the table names it."""
        text = self.param + (f", {self.grad} gradients" if self.grad != self.param else "")
        text += "".join(f", {m} moments" for m in sorted({*self.moments} - {self.param}))
        if self.rule == "AdamW":
            return text + (", amsgrad" if len(self.moments) > 2 else "")
        return f"{self.rule}: {text}" + (", momentum" if self.moments else "")

    @property
    def elements(self) -> int:
        """So many are stepped at a time: a vector of the narrowest operand."""
        return 16 // min(FORMAT_BYTES[f] for f in (self.param, self.grad, *self.moments))

    @property
    def bytes(self) -> int:
        """Bytes an element that the plain step reads and writes."""
        kept = sum(FORMAT_BYTES[f] for f in (self.param, *self.moments))
        return 2 * kept + FORMAT_BYTES[self.grad]

    def vectors(self, *formats: str) -> int:
        """16-byte accesses that so many elements take in each of the formats."""
        return sum(self.elements * FORMAT_BYTES[f] // 16 for f in formats)


def instructions(kernel: Kernel) -> dict[str, float]:
    """Instructions an element of the loop over aligned elements, by what the step does. A float64
    kernel has none here: its divisions have loops of their own.
    """
    loop = kernel.hot_loop
    if kernel.is_norm:
        (vectors,) = {sum(c.moves_16_bytes for c in loop.code)}
        grad = next(name for name in FORMAT_BYTES if f"::{name}>" in kernel.name)
        return {"norm": min(loop.paths.values()) * FORMAT_BYTES[grad] / 16 / vectors}
    if kernel.is_tiled:
        if kernel.tiled.param is None:  # the way through depends on the launch
            return {}
        return {"step": loop.shortest(*kernel.tiled.accesses, False) / 8}
    recipe = kernel.recipe
    if recipe.param == "float64":
        return {}
    stores = recipe.vectors(recipe.param, *recipe.moments)
    grads = recipe.vectors(recipe.grad)
    averages = recipe.vectors("float32")
    loads = stores + grads
    if not recipe.tail:
        counts = {"step": loop.shortest(loads, stores, False)}
    else:
        counts = {
            "average": loop.shortest(loads + averages, stores + averages, False),
            "statistics": loop.shortest(loads, stores, True),
            "all": loop.shortest(loads + averages, stores + averages + grads, True),
        }
    return {what: count / recipe.elements for what, count in counts.items()}


def disassemble(path: str | File) -> Iterator[tuple[str, str, str]]:
    """Architecture, mangled name and instructions, one a line, of every kernel. Their encodings,
    most of what cuobjdump writes, are dropped while it writes.
    """
    command = [find_cuobjdump() or "cuobjdump", "-sass", str(path)]
    architecture, name, lines = "", "", list[bytes]()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            code, end, _ = line.partition(b";")
            if end:
                lines.append(code)
            elif b"code for " in code or b"Function : " in code:
                if name:
                    yield architecture, name, b";\n".join([*lines, b""]).decode()
                name, lines = "", []
                if b"Function : " in code:
                    name = code.split()[-1].decode()
                else:
                    architecture = code.split()[-1].decode()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    if name:
        yield architecture, name, b";\n".join([*lines, b""]).decode()


def read(path: str | File) -> list[Kernel]:
    """Every kernel in a native module or a cubin."""

    command = [find_cuobjdump() or "cuobjdump", "-res-usage", str(path)]
    resources = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {}
    bare, *fat = re.split(r"arch = ", resources)  # a cubin does not say it here
    for architecture, part in [("", bare), *((part.split()[0], part) for part in fat)]:
        found = re.findall(r"Function (.+):\s+REG:(\d+) .*?SHARED:(\d+)", part)
        for name, registers, shared in found:
            usage[architecture, name] = int(registers), int(shared)
    # The names alone: of all the text, c++filt would take as long as reading it does.
    names = list(dict.fromkeys(name for _, name in usage))
    command, lines = ["c++filt"], "".join(f"{name}\n" for name in names)
    plain = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    plain_names = dict(zip(names, plain.splitlines(), strict=True))
    kernels = []
    for architecture, name, text in disassemble(path):
        key = (architecture, name) if (architecture, name) in usage else ("", name)
        kernels.append(Kernel(architecture, plain_names[name], *usage[key], text))
    return kernels


def table(kernels: list[Kernel]) -> str:
    """Registers, warps a multiprocessor, instructions an element and of plain kernels bytes, as
    Markdown; and how often an H200 could give the instructions while its memory moves the bytes.
    """
    lines = [
        "| kernel | registers | warps | instructions an element | bytes | issue / memory |",
        "| --- | --: | --: | :-- | --: | --: |",
    ]

    def line(kernel: Kernel, label: str, moved: float | None) -> str:
        found = instructions(kernel)
        counts = ", ".join(f"{what} {n:.0f}" for what, n in found.items())
        sides = "- | -"
        if moved is not None and found:
            (count,) = found.values()
            sides = f"{moved:.4g} | {INSTRUCTIONS / count / (BYTES / moved):.2f}"
        return f"| {label} | {kernel.registers} | {kernel.warps} | {counts or '-'} | {sides} |"

    order = {name: i for i, name in enumerate(("float32", "bfloat16", "float16", "float64"))}
    steps = [k for k in kernels if k.is_step]

    def place(kernel: Kernel) -> tuple[object, ...]:
        recipe = kernel.recipe
        formats = (recipe.param, recipe.grad, *recipe.moments[:1])
        return recipe.rule, recipe.tail, len(recipe.moments), *(order[f] for f in formats)

    for kernel in sorted(steps, key=place):
        label = kernel.recipe.label + ("; tail" if kernel.recipe.tail else "")
        lines.append(line(kernel, label, None if kernel.recipe.tail else kernel.recipe.bytes))
    tiled = [(k.tiled, k) for k in kernels if k.is_tiled]
    for what, kernel in sorted(tiled, key=lambda pair: (pair[0].param is None, pair[0].label)):
        lines.append(line(kernel, what.label, None if what.param is None else what.bytes))
    for kernel in (k for k in kernels if k.is_norm):
        name = re.search(r"::(\w+)>", kernel.name)
        count = instructions(kernel)["norm"]
        label = f"norm, {name.group(1) if name else kernel.name}"
        lines.append(f"| {label} | {kernel.registers} | {kernel.warps} | {count:.1f} | - | - |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="bench.machine_code", description=__doc__)
    parser.add_argument("file", nargs="?", help="a native module or cubin (the installed module)")
    parser.add_argument("--architecture", default="sm_90", help="sm_90")
    options = parser.parse_args()
    if options.file is None:
        from warpstep import backends

        native, why = backends.native()
        if native is None or native.cuda_architectures is None:
            sys.exit(f"the installed module has no CUDA code: {why or 'it was built without'}")
        options.file = native.__file__
    if missing := missing_tool():
        sys.exit(f"needs {missing}")
    print(table([k for k in read(options.file) if k.architecture == options.architecture]))


if __name__ == "__main__":
    main()
