"""warpstep.enable(): torch's fused optimizers on warpstep's kernels, in torch's semantics."""

import sys
import threading

import pytest
import torch

import warpstep
from support.enabling import each_way, go
from support.environment import EMULATED
from support.lists import HYPERS, assert_same_lists, clones, flat, streams
from support.parameters import new_params, set_grads, take_steps
from warpstep import modes
from warpstep.backends import BackendUnavailableError
from warpstep.enabling import override, shortcut

SIZES = [(3,), (40, 7), (), (0, 2), (1000,)] * 2
CLASSES = [torch.optim.AdamW, torch.optim.Adam]

pytestmark = pytest.mark.skipif(EMULATED, reason="the CPU's kernel is enabled elsewhere")


@pytest.fixture(autouse=True)
def left_disabled():
    yield
    warpstep.disable()
    assert not warpstep.status().enabled


def state_of(optimizer):
    return [t for state in optimizer.state.values() for t in state.values()]


def counts():
    status = warpstep.status()
    return status.taken, dict(status.passed_on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"lr": "tensor"}])
@pytest.mark.parametrize("kind", CLASSES)
@each_way
def test_steps_as_torch(way, kind, options, dtype, monkeypatch):
    """Parameters and state are a few roundings from torch's; all calls are taken."""
    go(way, monkeypatch)
    options = {"weight_decay": 0.1, "fused": True, **options}
    if options.get("lr"):
        options["lr"] = torch.tensor(0.01)
    theirs, mine = new_params(SIZES, dtype=dtype), new_params(SIZES, dtype=dtype)
    their_optimizer, my_optimizer = kind(theirs, **options), kind(mine, **options)
    take_steps(their_optimizer, range(4))
    before = counts()
    with warpstep.enabled():
        take_steps(my_optimizer, range(4))
    after = counts()
    assert (after[0] - before[0], after[1]) == (4, before[1])
    near = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)
    for a, b in zip(state_of(my_optimizer), state_of(their_optimizer), strict=True):
        assert a.dtype == b.dtype
        assert a._version == b._version
        torch.testing.assert_close(a, b, rtol=near, atol=near)
    assert [p._version for p in mine] == [p._version for p in theirs]


@pytest.mark.parametrize("kind", CLASSES)
@each_way
def test_bits_of_warpsteps_own(way, kind, monkeypatch):
    go(way, monkeypatch)
    ours, mine = new_params(SIZES), new_params(SIZES)
    take_steps(getattr(warpstep, kind.__name__)(ours, weight_decay=0.1), range(4))
    with warpstep.enabled():
        take_steps(kind(mine, weight_decay=0.1, fused=True), range(4))
    assert all(torch.equal(a, b) for a, b in zip(mine, ours, strict=True))


@pytest.mark.parametrize("name", [name for name in override.OPERATORS if "adam" in name])
def test_operators(name):
    """Each of Adam's four operators is taken, coupled or not, with lr in either form."""
    operator, _, overload = name.partition(".")
    call = getattr(getattr(torch.ops.aten, operator), overload or "default")
    hypers = {**HYPERS, "amsgrad": False, "maximize": False}
    if overload:
        hypers["lr"] = torch.tensor(HYPERS["lr"])
    theirs, mine, ours = streams(), streams(), streams()
    call(*theirs[:4], [], theirs[5], **hypers)
    taken = counts()[0]
    with warpstep.enabled():
        call(*mine[:4], [], mine[5], **hypers)
    assert counts()[0] == taken + 1
    function = warpstep.functional.adamw_ if "adamw" in name else warpstep.functional.adam_
    lr = float(hypers["lr"])
    function(*ours, **{**HYPERS, "lr": lr}, advance_steps=False)
    assert_same_lists(mine, ours)
    for a, b in zip(flat(mine), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-7)


@each_way
def test_a_launch_a_step(way, monkeypatch):
    """One launch for all tensors, whatever their number."""
    go(way, monkeypatch)
    params = new_params([(2,)] * 500)
    optimizer = torch.optim.AdamW(params, fused=True)
    with warpstep.enabled():
        before = warpstep.status().launches["cpu"]
        take_steps(optimizer, range(3))
        assert warpstep.status().launches["cpu"] - before == 3


def test_disable_restores_torchs_kernels():
    """Before, after and without: the same bits of torch; the same function in torch.optim."""
    untouched, restored = new_params(SIZES), new_params(SIZES)
    module = sys.modules["torch.optim.adam"]
    function = module._fused_adam
    kernel = torch._C._dispatch_dump("aten::_fused_adamw_")
    take_steps(torch.optim.AdamW(untouched, fused=True), range(4))
    warpstep.enable()
    assert torch._C._dispatch_dump("aten::_fused_adamw_") != kernel
    assert module._fused_adam is not function
    other = new_params(SIZES)
    take_steps(torch.optim.AdamW(other, fused=True), range(4))
    warpstep.disable()
    assert torch._C._dispatch_dump("aten::_fused_adamw_") == kernel
    assert module._fused_adam is function
    taken = counts()
    take_steps(torch.optim.AdamW(restored, fused=True), range(4))
    assert counts() == taken
    assert all(torch.equal(a, b) for a, b in zip(restored, untouched, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(restored, other, strict=True))


def test_nesting():
    """enable() is idempotent, scopes count, and one does not undo the other."""

    def on():
        return warpstep.status().enabled

    warpstep.enable()
    warpstep.enable()
    assert on()
    with warpstep.enabled():
        assert on()
    assert on()
    warpstep.disable()
    assert not on()
    with warpstep.enabled(), warpstep.enabled():
        pass
    with warpstep.enabled():
        with warpstep.enabled():
            pass
        assert on()
        warpstep.enable()
        warpstep.disable()
        assert on()
    assert not on()
    with pytest.raises(KeyError), warpstep.enabled():
        raise KeyError
    assert not on()
    warpstep.disable()


def passed_on(call):
    """Why calls were passed on."""
    before = warpstep.status()
    with warpstep.enabled():
        call()
    after = warpstep.status()
    assert after.taken == before.taken
    return [k for k, n in after.passed_on.items() if n > before.passed_on.get(k, 0)]


def fused(lists, **options):
    hypers = {**HYPERS, "amsgrad": False, "maximize": False, **options}
    torch._fused_adamw_(*lists[:4], [], lists[5], **hypers)


def gaps(tensor):
    wide = torch.zeros(*tensor.shape, 2)
    wide[..., 0] = tensor
    return wide[..., 0]


@pytest.mark.parametrize("streams_with_gaps", [(0, 1, 2, 3), (1,)])
def test_layouts_go_to_torch(streams_with_gaps):
    """Gaps in memory, or strides that differ, are torch's: its bits, whatever they are."""
    mine, theirs = streams([(5,), (4,)]), streams([(5,), (4,)])
    for ls in (mine, theirs):
        for s in streams_with_gaps:
            ls[s][1] = gaps(ls[s][1])
    reasons = passed_on(lambda: fused(mine))
    assert reasons == ["gaps in memory" if 0 in streams_with_gaps else "strides that differ"]
    fused(theirs)
    assert_same_lists(mine, theirs)


def test_steps_of_another_kind_go_to_torch():
    """What the counters must be is told by the reason; torch's own error or result comes."""
    lists = streams([(5,)])
    lists[5] = [torch.tensor([1, 2])]
    before = clones(lists)
    with pytest.raises(RuntimeError):
        passed_on(lambda: fused(lists))
    assert_same_lists(lists, before)
    assert warpstep.status().passed_on["a step that is not one float32 on the device"] >= 1


def test_integers_are_torchs_error():
    """torch's message, and nothing changed."""
    lists = [[torch.ones(3, dtype=torch.int64)] for _ in range(4)] + [[], [torch.ones(())]]
    with pytest.raises(RuntimeError):
        passed_on(lambda: fused(lists))
    assert all(stream[0].sum() == 3 for stream in lists[:4])


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("kind", CLASSES)
@each_way
def test_scale_and_inf(way, kind, found_inf, monkeypatch):
    """Gradients are left unscaled as torch leaves them; an inf changes nothing."""
    go(way, monkeypatch)
    results = []
    for on in (False, True):
        params = new_params(SIZES)
        optimizer = kind(params, fused=True)
        take_steps(optimizer, range(1))
        set_grads(params, 7, scale=16.0)
        optimizer.grad_scale = torch.tensor(16.0)
        optimizer.found_inf = torch.tensor(found_inf)
        if on:
            with warpstep.enabled():
                optimizer.step()
        else:
            optimizer.step()
        results.append((params, [p.grad for p in params], state_of(optimizer)))
    for theirs, mine in zip(*results, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_operator_with_scale_and_inf(found_inf):
    """The operator itself: counters are the caller's, gradients are left unscaled."""
    mine, theirs = streams(), streams()
    scalars = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(found_inf)}
    before = clones(mine)
    fused(theirs, **scalars)
    taken = counts()[0]
    with warpstep.enabled():
        fused(mine, **scalars)
    assert counts()[0] == taken + 1
    for a, b in zip(flat(mine), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-7)
    assert_same_lists(mine, before, [5] if found_inf == 0 else range(6))


@each_way
def test_grad_scaler(way, monkeypatch):
    """torch.amp.GradScaler skips the step with the inf, and goes on."""
    go(way, monkeypatch)
    results = []
    for on in (False, True):
        params = new_params(SIZES)
        optimizer = torch.optim.AdamW(params, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        (warpstep.enable if on else warpstep.disable)()
        for seed in range(4):
            set_grads(params, seed, scale=4.0)
            if seed == 2:
                params[1].grad[3] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        results.append((params, state_of(optimizer), [torch.tensor(scaler.get_scale())]))
    assert {s["step"].item() for s in optimizer.state.values()} == {3.0}
    for theirs, mine in zip(*results, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-6)


def test_modes_see_torchs_operators():
    """Who watches operators sees torch's own, also while enabled."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    params = new_params(SIZES)
    optimizer = torch.optim.AdamW(params, fused=True)
    set_grads(params, 0)
    with warpstep.enabled(), Watching():
        optimizer.step()
    assert "_fused_adamw_" in seen


def test_compiled_step():
    """A compiled torch step runs while enabled, and is taken."""
    mine, theirs = new_params(SIZES), new_params(SIZES)
    take_steps(torch.optim.AdamW(theirs, fused=True), range(2))
    optimizer = torch.optim.AdamW(mine, fused=True)
    step = torch.compile(optimizer.step, backend="aot_eager")
    taken = counts()[0]
    with warpstep.enabled():
        for seed in range(2):
            set_grads(mine, seed)
            step()
    assert counts()[0] > taken
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-6)


@each_way
def test_tensor_betas(way, monkeypatch):
    """Tensor betas are numbers by the time they reach the operator; all is taken all the same."""
    go(way, monkeypatch)
    mine, theirs = new_params(SIZES), new_params(SIZES)
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    take_steps(torch.optim.AdamW(theirs, betas=(0.9, 0.99), fused=True), range(4))
    taken = counts()[0]
    with warpstep.enabled():
        optimizer = torch.optim.AdamW(mine, lr=torch.tensor(1e-3), betas=betas, fused=True)
        take_steps(optimizer, range(4))
    assert counts()[0] == taken + 4
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_another_torch(monkeypatch):
    """Where the private function differs from what is known, it is not replaced."""
    go("shortcut", monkeypatch)
    module = sys.modules["torch.optim.adam"]
    original = module._fused_adam
    monkeypatch.setattr(module, "_fused_adam", lambda *args, new=None, **kw: original(*args, **kw))
    theirs = module._fused_adam
    params = new_params(SIZES)
    taken = counts()[0]
    with warpstep.enabled():
        assert module._fused_adam is theirs
        take_steps(torch.optim.AdamW(params, fused=True), range(4))
    assert counts()[0] == taken + 4


def test_others_wrapping_is_kept(monkeypatch):
    """A function put over the shortcut meanwhile stays in its place, and works."""
    module = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(module, "_fused_adam", module._fused_adam)
    warpstep.enable()
    ours = module._fused_adam
    theirs = lambda *args, **kw: ours(*args, **kw)  # noqa: E731
    module._fused_adam = theirs
    warpstep.disable()
    assert module._fused_adam is theirs
    taken = counts()
    mine, plain = new_params(SIZES), new_params(SIZES)
    take_steps(torch.optim.AdamW(mine, fused=True), range(4))
    assert counts() == taken
    monkeypatch.undo()
    take_steps(torch.optim.AdamW(plain, fused=True), range(4))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_over_anothers_override():
    """Calls go on to a kernel that someone else had registered; status names it."""
    called = []
    library = torch.library.Library("aten", "IMPL")
    with override.quiet():
        library.impl("_fused_adamw_", lambda *args, **kw: called.append(len(args[0])), "CPU")
    try:
        warpstep.enable()
        assert "aten::_fused_adamw_ on CPU" in str(warpstep.status())
        lists = streams([(5,)])
        fused(lists)
        assert called == []
        lists[1][0] = gaps(lists[1][0])
        fused(lists)
        assert called == [1]
        warpstep.disable()
        fused(lists)
        assert called == [1, 1]
    finally:
        library._destroy()
    fused(lists)
    assert called == [1, 1]


@each_way
def test_threads(way, monkeypatch):
    """Steps in several threads while another one enables and disables."""
    go(way, monkeypatch)
    models = [new_params(SIZES) for _ in range(3)]
    optimizers = [torch.optim.AdamW(m, fused=True) for m in models]
    workers = [threading.Thread(target=take_steps, args=(o, range(30))) for o in optimizers]
    for worker in workers:
        worker.start()
    while any(w.is_alive() for w in workers):
        with warpstep.enabled():
            pass
    for worker in workers:
        worker.join()
    for optimizer, params in zip(optimizers, models, strict=True):
        assert {s["step"].item() for s in optimizer.state.values()} == {30.0}
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("missing", ["module", "get_kernel"])
def test_without_kernels(monkeypatch, missing):
    """A clear error, and nothing changed."""
    if missing == "module":
        monkeypatch.setattr(override.backends, "native", lambda: (None, "taken away"))
    else:
        monkeypatch.delattr(torch.library, "get_kernel")
    kernel = torch._C._dispatch_dump("aten::_fused_adamw_")
    with pytest.raises(BackendUnavailableError, match="Nothing has been changed"):
        warpstep.enable()
    with pytest.raises(BackendUnavailableError), warpstep.enabled():
        pass
    assert torch._C._dispatch_dump("aten::_fused_adamw_") == kernel
    monkeypatch.setenv("WARPSTEP_ENABLE", "1")
    monkeypatch.setattr(override, "refusal", "")
    override.enable_if_asked()
    assert "could not be granted" in override.report()


def test_failure_while_enabling(monkeypatch):
    """What fails halfway is undone."""
    kernel = torch._C._dispatch_dump("aten::_fused_adamw_")
    real = torch.library.get_kernel

    def failing(name, key):
        if "adam_" in name:
            raise RuntimeError("out of kernels")
        return real(name, key)

    monkeypatch.setattr(torch.library, "get_kernel", failing)
    with pytest.raises(RuntimeError, match="out of kernels"):
        warpstep.enable()
    assert torch._C._dispatch_dump("aten::_fused_adamw_") == kernel
    monkeypatch.undo()
    warpstep.enable()
    assert warpstep.status().enabled


def test_status():
    """The numbers, and one line that says so."""
    status = warpstep.status()
    assert isinstance(status.taken, int)
    assert isinstance(status.passed_on, dict)
    assert "torch's fused optimizers: own" in str(status)
    with warpstep.enabled():
        assert "torch's fused optimizers: warpstep on CPU" in str(warpstep.status())


def test_the_shortcut_knows_this_torch():
    """The private function is as it is known; else steps are slower than they could be."""
    if torch.__version__.startswith("2.13"):
        with warpstep.enabled():
            assert sys.modules["torch.optim.adam"]._fused_adam.__module__ == shortcut.__name__
    assert not modes.is_watched()
