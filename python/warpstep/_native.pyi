"""Types of the native module (csrc/bindings.cpp)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

cuda_architectures: str | None
why_no_cuda: str

def cuda_device_count() -> int: ...
def cpu_instruction_set() -> str: ...
def restarts_calls(signal: int) -> bool: ...
def has_recipe(param: str, grad: str, moment: str, amsgrad: bool) -> bool: ...
def set_exchange_api(capsule: Any, *, torch_abi: bool) -> None: ...
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
        param: str,
        grad: str,
        moment: str,
        amsgrad: bool,
        ema: str | None,
    ) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        state: dict[Any, Any],
        param_groups: list[dict[str, Any]],
        assignments: list[int],
        buckets: list[BucketSpec],
        match_layout: Callable[[Tensor, Tensor], Tensor],
    ) -> None: ...
    def step(
        self,
        state: Any,
        param_groups: Any,
        threads: int,
        tensors: list[tuple[Tensor | None, ...]] | None,
        *,
        zero_grads: bool,
        expected_grads: int,
    ) -> str | None: ...
    def check(self, state: Any, param_groups: Any, threads: int) -> str | None: ...
    def keep_alive(self) -> None: ...
    def let_go(self) -> None: ...
    def launch(
        self,
        threads: int,
        tensors: list[tuple[Tensor | None, ...]] | None,
        *,
        zero_grads: bool,
        unscale_grads: bool,
    ) -> None: ...
    def grad_norm(self, bucket: int, *, largest: bool, threads: int, out: Tensor) -> None: ...
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
    def set_device_tables(
        self, bucket: int, *, rows: int, chunks: int, arrivals: int, hypers: int
    ) -> None: ...
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
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        coupled: bool,
        cuda: bool,
        advance_steps: bool,
        unscale_grads: bool,
        dispatched: bool,
        always: bool,
        count_writes: bool,
        threads: int,
    ) -> str | None: ...
