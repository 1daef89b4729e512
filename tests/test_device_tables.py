"""Lists on CUDA: their tables are uploaded once, found again, and never mistaken for another's."""

import pytest
import torch

from support.lists import HYPERS, assert_same_lists, clones, streams
from warpstep import list_steps
from warpstep import lists as native_lists
from warpstep.functional import adamw_
from warpstep.rules import ADAMW


def use_stepper(monkeypatch, upload):
    """A stepper of the test's own."""
    module, _ = native_lists.backends.native()
    stepper = module.ListStepper(upload=upload, use=native_lists._use, resident_bytes=3000)
    for caller in (native_lists, list_steps):
        monkeypatch.setattr(caller, "stepper", lambda: stepper)


@pytest.fixture
def uploads(backend, monkeypatch):
    """A stepper of its own, and the uploads that it makes."""
    if backend != "cuda":
        pytest.skip("of the CUDA backend")
    made = []

    def upload(device, *tables):
        made.append(sum(map(len, tables)))
        return native_lists._upload(device, *tables)

    use_stepper(monkeypatch, upload)
    return made


def step(lists, always=True):
    options = native_lists.Options(
        HYPERS["lr"],
        (HYPERS["weight_decay"], HYPERS["beta1"], HYPERS["beta2"], HYPERS["eps"]),
        maximize=False,
        coupled=False,
        grad_scale=None,
        found_inf=None,
        advance_steps=True,
        unscale_grads=False,
    )
    given = native_lists.lists_of(ADAMW, lists, {"amsgrad": False})
    return native_lists.stepper().step(
        given.rule.name,
        given.tensors,
        options,
        native_lists.FUNCTION._replace(always=always),
        True,  # with CUDA
        1,  # thread
        None,  # of low precision
    )


def test_uploaded_once(uploads, device):
    """The same tensors come again: one upload, also with new gradients."""
    lists = streams(device=device)
    for seed in range(3):
        lists[1] = streams(device=device, seed=seed)[1]
        adamw_(*lists, **HYPERS, backend="cuda")
    assert len(uploads) == 1


@pytest.mark.parametrize("stream", [0, 2, 3, 5])
def test_every_address_counts(uploads, device, stream):
    """Another tensor in any list but the gradients' is another table, and the right one."""
    lists, plain = streams(device=device), streams(device=device)
    for _ in range(2):
        adamw_(*lists, **HYPERS, backend="cuda")
        adamw_(*plain, **HYPERS, backend="reference")
        lists[stream] = [tensor.clone() for tensor in lists[stream]]
    assert len(uploads) == 2
    for mine, other in zip(lists[0], plain[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_same_addresses_in_another_shape(uploads, device):
    """Memory that is used anew for other sizes is not the old table's."""
    memory = [torch.ones(64, device=device) for _ in range(4)]
    counter = torch.zeros((), device=device)
    for size in (64, 32, 64):
        lists = [[m[:size]] for m in memory]
        before = clones(lists)
        adamw_(*lists, [], [counter], **HYPERS, backend="cuda")
        assert (lists[0][0] != before[0][0]).all()
        assert (memory[0][size:] == memory[0][size:].clone()).all()
    assert len(uploads) == 2


def test_old_tables_go(uploads, device):
    """Only so many bytes stay on the device: what was not used for longest is uploaded anew."""
    some = [streams([(1,)] * 9, device=device, seed=seed) for seed in range(4)]
    for lists in some:
        assert step(lists) is None
    assert len(uploads) == 4
    for lists, uploaded in ((some[3], 4), (some[2], 4), (some[0], 5), (some[2], 5), (some[1], 6)):
        assert step(lists) is None
        assert len(uploads) == uploaded


def test_tables_too_large_to_keep(uploads, device):
    """A table larger than all that may stay is used all the same."""
    lists = streams([(1,)] * 40, device=device)
    for _ in range(2):
        assert step(lists) is None
    assert {counter.item() for counter in lists[5]} == {6.0}


def test_addresses_that_never_come_twice(uploads, device):
    """After so many uploads in vain, only what comes a second time is uploaded."""
    held = [streams([(3,)], device=device, seed=seed) for seed in range(66)]
    for lists in held[:64]:
        assert step(lists, always=False) is None
    assert step(held[64], always=False) == "tensors that lie elsewhere at each step"
    before = clones(held[65])
    assert step(held[65], always=False) == "tensors that lie elsewhere at each step"
    assert_same_lists(held[65], before)
    assert step(held[65], always=False) is None  # a second time
    assert step(held[65], always=False) is None
    assert step(held[64], always=False) is None  # something has come again: patient anew


def test_failed_upload_changes_nothing(uploads, device, monkeypatch):
    """Out of memory is an error before anything is written."""

    def upload(*_):
        raise MemoryError("no room")

    use_stepper(monkeypatch, upload)
    lists = streams(device=device)
    before = clones(lists)
    with pytest.raises(MemoryError, match="no room"):
        adamw_(*lists, **HYPERS, backend="cuda")
    assert_same_lists(lists, before)
