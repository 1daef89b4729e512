"""Types of the native module (csrc/bindings.cpp)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

cuda_architectures: str | None
cuda_device_type: str | None
why_no_cuda: str
list_options: tuple[str, ...]

def cuda_device_count() -> int: ...
def cuda_device_reason(device: int) -> str: ...
def cpu_instruction_set() -> str: ...
def restarts_calls(signal: int) -> bool: ...
def has_recipe(rule: str, formats: tuple[str | None, ...]) -> bool: ...
def connect_to_torch(capsule: Any, *, torch_abi: bool) -> None: ...
def survey(
    param: Tensor, state: dict[str, Any], keys: tuple[str | None, ...], counter: str | None
) -> tuple[str | None, ...] | None: ...
def uses_handles() -> bool: ...
def uses_torchs_threads() -> bool: ...
def launch_counts() -> dict[str, int]: ...
def touch_streams(
    tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], threads: int
) -> None: ...

class BucketSpec:
    def __init__(
        self,
        *,
        backend: str,
        rule: str,
        formats: tuple[str | None, ...],
        keys: tuple[str | None, ...],
        counter: str | None,
    ) -> None: ...

class GroupKeys:
    def __init__(
        self,
        *,
        numbers: list[tuple[str, int]],
        switches: list[str],
        flags: list[str],
        decoupled: str | None,
    ) -> None: ...

class PlanOptions:
    def __init__(
        self,
        *,
        seed: int,
        firsts: dict[Tensor, int],
        copies: dict[Tensor, Tensor],
        counters: dict[Tensor, Tensor],
        grad_name: str | None,
        watches_masters: bool,
        as_fused: bool,
    ) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        state: dict[Any, Any],
        param_groups: list[dict[str, Any]],
        keys: GroupKeys,
        assignments: list[int],
        buckets: list[BucketSpec],
        match_layout: Callable[[Tensor, Tensor], Tensor],
        options: PlanOptions,
    ) -> None: ...
    def written_params(self, param_groups: Any) -> list[Tensor]: ...
    def note_versions(self, param_groups: Any) -> None: ...
    def step(
        self,
        state: Any,
        param_groups: Any,
        threads: int,
        tensors: list[tuple[Tensor | None, ...]] | None,
        zero_grads: bool,
        expected_grads: int,
        /,
    ) -> str | None: ...
    def check(self, state: Any, param_groups: Any, threads: int) -> str | None: ...
    def keep_alive(self) -> None: ...
    def let_go(self) -> None: ...
    def launch(
        self,
        threads: int,
        tensors: list[tuple[Tensor | None, ...]] | None,
        zero_grads: bool,
        unscale_grads: bool,
        /,
    ) -> None: ...
    def grad_norm(self, bucket: int, largest: bool, threads: int, out: Tensor, /) -> None: ...
    def chunk_counts(self, bucket: int) -> list[int]: ...
    def chunk_count(self, bucket: int) -> int: ...
    def gather_grads(self, param_groups: Any, threads: int) -> str | None: ...
    def remember_grads(self) -> int: ...
    def compare_grads(self) -> tuple[int, int]: ...
    def count_grads(self) -> int: ...
    def has_shared_grads(self) -> bool: ...
    def copied_grads(self) -> list[tuple[Tensor, Tensor]]: ...
    def forget_grads(self) -> None: ...
    def host_tables(self, bucket: int) -> dict[str, bytes]: ...
    def set_device_tables(self, bucket: int, *, rows: int, chunks: int, arrivals: int) -> None: ...
    def set_least(self, bucket: int, *, least: int, shared: bool) -> None: ...
    def find_least(self, bucket: int, threads: int, /) -> None: ...
    def grad_table(self, bucket: int) -> bytes: ...
    def hyper_table(self, bucket: int) -> bytes: ...

class ListStepper:
    def __init__(
        self,
        *,
        upload: Callable[..., tuple[Any, ...]],
        use: Callable[[Any], None],
        resident_bytes: int,
    ) -> None: ...
    def step(
        self,
        rule: str,
        lists: Sequence[list[Tensor]],
        options: tuple[Any, ...],
        cuda: bool,
        dispatched: bool,
        always: bool,
        count_writes: bool,
        threads: int,
        low_precision: tuple[list[Tensor] | None, ...] | None,
        /,
    ) -> str | None: ...
