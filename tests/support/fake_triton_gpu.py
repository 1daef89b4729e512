"""A GPU that is not there, for what launches Triton's kernels: its memory is the CPU's.

Triton's own JIT binds, specialises and compiles each launch. The driver then looks at what would be
launched: whether memory that is read on a stream was made on it or recorded for it; whether a host
buffer stays as it was while a copy may yet read it, in a captured graph at each replay; and whether
what a graph reads is still there when it is replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Values = dict[str, Tensor]


class FakeGpu:
    """Takes the GPU's place in ``kernel``, the module kernels.triton.launch, while a test runs.

    Attributes:
        stream: the number of the current stream.
        pins_in_captures: whether memory can be pinned meanwhile; not every driver can.
        copies: how many copies to the device were asked for.
        launched: each launch's arguments, by their names, as the kernel would have read them.
        variants: kernels compiled, one after another, each with what it is specialised for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: Any, compiles: bool) -> None:
        self.stream, self.pins_in_captures = 0, False
        self.copies = 0
        self.launched: list[Values] = []
        self.variants: list[str] = []
        self._compiles = compiles
        self._copied: list[tuple[Callable[[], Tensor | None], Tensor]] = []  # from where, and what
        self._pool: list[Tensor] = []
        self._graph: list[Callable[[], None]] | None = None

        monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(self))
        for function in (
            kernel.step_kernel,
            kernel.grad_norm_kernel,
            kernel.least_magnitude_kernel,
        ):
            binder = self._binder_of(monkeypatch, function)
            monkeypatch.setattr(function, "device_caches", defaultdict(binder))
        monkeypatch.setattr(kernel, "torch", _Torch(self))
        to = Tensor.to
        monkeypatch.setattr(Tensor, "to", lambda t, *a, **k: self._copy(t, to, *a, **k))
        monkeypatch.setattr(
            Tensor, "record_stream", lambda t, s: self._streams_of(t).add(s.stream_id)
        )

    def tensor(self, *data: Any, **options: Any) -> Tensor:
        """A tensor made on the current stream."""
        return self._made(torch.tensor(*data, **options))

    @contextmanager
    def capture(self) -> Iterator[Callable[[], None]]:
        """Captures what is launched; gives what replays it."""
        graph: list[Callable[[], None]] = []

        def replay() -> None:
            self._check_copied()
            for call in graph:
                call()

        self._graph = graph
        yield replay
        self._graph = None

    @property
    def capturing(self) -> bool:
        """Whether the current stream is being captured."""
        return self._graph is not None

    def _made(self, tensor: Tensor) -> Tensor:
        tensor.streams = {self.stream}
        if self.capturing:
            self._pool.append(tensor)  # a graph's own memory lives as long as it
        return tensor

    def _streams_of(self, tensor: Tensor) -> set[int]:
        """The streams that it was made on or recorded for; one met first is new."""
        if not hasattr(tensor, "streams"):
            self._made(tensor)
        return tensor.streams

    def pinned(self, like: Tensor) -> Tensor:
        assert self.pins_in_captures or not self.capturing, "memory is pinned in a capture"
        return torch.zeros_like(like)

    def _copy(self, host: Tensor, to: Any, *arguments: Any, **options: Any) -> Tensor:
        dtypes = [x for x in arguments if isinstance(x, torch.dtype)]
        if not any(isinstance(x, torch.device) and x.type == "cuda" for x in arguments):
            return to(host, *arguments, **options)
        self.copies += 1
        if not options.get("non_blocking"):
            assert not self.capturing, "waits in a capture"
            return self._made(to(host, *dtypes, copy=True))
        assert not dtypes
        self._copied.append((ref(host), host.clone()))
        on_device = self._made(torch.zeros_like(host))
        if self._graph is not None:
            at_replay = _Captured(host=host, on_device=on_device)
            self._graph.append(lambda: at_replay["on_device"].copy_(at_replay["host"]))
        else:
            on_device.copy_(host)
        return on_device

    def _check_copied(self) -> None:
        for host, words in self._copied:
            buffer = host()
            assert buffer is None or buffer.equal(words), "a buffer was written a second time"

    def launch(self, names: list[str], arguments: tuple[Any, ...]) -> None:
        """What a kernel is launched with."""
        self._check_copied()
        tensors = {n: x for n, x in zip(names, arguments, strict=True) if isinstance(x, Tensor)}
        for name, tensor in tensors.items():
            assert self.stream in self._streams_of(tensor), f"{name} may be freed under the launch"
        read = _Captured(**tensors)
        if self._graph is not None:
            self._graph.append(lambda: self.launched.append(read.values()))
        else:
            self.launched.append(read.values())

    def _binder_of(self, monkeypatch: pytest.MonkeyPatch, function: Any) -> Callable[[], Any]:
        """Makes a kernel's cache of variants, whose making is counted."""

        def compiled(source: Any, **options: Any) -> Any:
            self.variants.append(variant_of(source))
            if self._compiles:
                return triton.compile(source, **options)
            run = _Driver(self).launcher_cls(source, None)
            made = SimpleNamespace(run=run, function=None, packed_metadata=None)
            made.launch_metadata = lambda *arguments: None
            return made

        def binder() -> Any:
            made = function.create_binder()
            monkeypatch.setattr(function, "compile", compiled)
            return made

        return binder


def variant_of(source: ASTSource) -> str:
    """What a kernel is specialised for: types, None or not, constants, and known alignments."""
    attrs = {path: attr for path, attr in source.attrs.items() if attr}
    return f"{source.name} {source.signature} {attrs} {source.constants}"


class _Captured:
    """Tensors by their names, not kept alive."""

    def __init__(self, **tensors: Tensor) -> None:
        self._refs = {name: ref(tensor) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._refs[name]()
        assert tensor is not None, f"{name} was freed, and a graph reads it"
        return tensor

    def values(self) -> Values:
        return {name: self[name].clone() for name in self._refs}


class _Driver:
    """Triton's driver of an H100."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (0, 0, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = list(source.fn.arg_names)
        return lambda *arguments: self._gpu.launch(names, arguments[-len(names) :])

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self._gpu.stream


class _Torch:
    """torch, for a module that believes in the GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.cuda = SimpleNamespace(
            is_current_stream_capturing=lambda: gpu.capturing,
            current_stream=lambda device: SimpleNamespace(stream_id=gpu.stream),
            device=lambda device: nullcontext(),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def get_device_module(self, device: torch.device) -> Any:
        return self.cuda

    def zeros(self, *size: Any, device: torch.device, **options: Any) -> Tensor:
        return self._gpu._made(torch.zeros(*size, **options))

    def empty_like(self, tensor: Tensor, *, pin_memory: bool) -> Tensor:
        return self._gpu.pinned(tensor)
