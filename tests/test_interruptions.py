"""A signal at any line of a call: what the call has begun is whole, and steps go on after it."""

import importlib
import itertools
import signal

import pytest
import torch

import warpstep
from support.interruptions import InterruptionError, interrupted_at, raise_interruption
from warpstep.enabling import override

LR = 0.1


@pytest.fixture(autouse=True)
def _raising_handler():
    before = signal.signal(signal.SIGUSR1, raise_interruption)
    yield
    assert signal.getsignal(signal.SIGUSR1) is raise_interruption
    signal.signal(signal.SIGUSR1, before)


def new_params(dtypes=(torch.float32, torch.bfloat16)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def values_of(params):
    return [param.detach().clone() for param in params]


def at_every_line(prepare, call, look, every=1):
    """What ``look`` finds after a signal at each line of ``call``, and without one (the last).

    With ``every``, at some lines only: a step of the reference has hundreds.

    Each time with what ``prepare`` returns, when nothing holds what was raised any more.
    """
    for line in itertools.count(step=every):
        made = prepare()
        came, raised = interrupted_at(line, lambda: call(*made))  # noqa: B023
        assert (raised is not None) == came
        del raised
        yield look(*made)
        if not came:
            return


def assert_some_and_some(found, before, after):
    """Each is the one or the other, bit for bit, and the last is the other."""
    kinds = []
    for one in found:
        matches = [
            all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            for other in (before, after)
        ]
        assert any(matches), f"line {len(kinds)}"
        kinds.append(matches.index(True))
    assert kinds[-1] == 1
    assert kinds[0] == 0


OPTIONS = {
    "plain": {},
    "8bit": {"state_dtype": "8bit", "ema_decay": 0.9},
    "reference": {"backend": "reference"},
    "master": {"master": "residual"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_steps_go_on_after_a_first_one_that_was_interrupted(case):
    """A state of which a part was missing would have made all of them raise."""
    dtypes = (torch.bfloat16,) * 2 if case == "master" else (torch.float32, torch.bfloat16)

    def prepare():
        params = new_params(dtypes)
        set_grads(params, 0)
        return warpstep.AdamW(params, lr=LR, **OPTIONS[case]), params

    def step_once_more(optimizer, params):
        set_grads(params, 1)
        optimizer.step()
        return values_of(params)

    optimizer, params = prepare()
    optimizer.step()
    after = step_once_more(optimizer, params)
    before = step_once_more(*prepare())
    every = 5 if case == "reference" else 1
    found = at_every_line(prepare, lambda optimizer, _: optimizer.step(), step_once_more, every)
    assert_some_and_some(found, before, after)


def test_a_loaded_float32_master_is_converted_as_a_whole():
    """It becomes the parameter and a residual, which belong together."""

    def prepare():
        params = new_params((torch.bfloat16,) * 2)
        optimizer = warpstep.AdamW(params, lr=LR, master="residual")
        set_grads(params, 0)
        optimizer.step()
        saved = optimizer.state_dict()
        for number, state in saved["state"].items():
            generator = torch.Generator().manual_seed(number)
            state["master_param"] = torch.randn(5, generator=generator)
        optimizer.load_state_dict(saved)
        set_grads(params, 1)
        return optimizer, params

    def masters_after_a_step(optimizer, params):
        set_grads(params, 2)
        optimizer.step()
        return [optimizer.master_parameters()[param] for param in params]

    optimizer, params = prepare()
    optimizer.step()
    after = masters_after_a_step(optimizer, params)
    before = masters_after_a_step(*prepare())
    found = at_every_line(prepare, lambda optimizer, _: optimizer.step(), masters_after_a_step)
    assert_some_and_some(found, before, after)


def test_a_scaler_is_told_of_a_clipping_that_there_is():
    """Told of one that there was not, it would have left scaled gradients to the step."""

    def prepare():
        params = new_params()
        optimizer = warpstep.AdamW(params, lr=LR)
        set_grads(params, 0)
        optimizer.step()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        set_grads(params, 1)
        for param in params:
            param.grad *= 1024
        return optimizer, params, scaler

    def clip(optimizer, _, scaler):
        optimizer.clip_grad_norm_(0.5, scaler=scaler)

    def step(optimizer, params, scaler):
        # The step that the rule takes shows the gradients' size by the moments only.
        scaler.step(optimizer)
        return [optimizer.state[param]["exp_avg"].clone() for param in params]

    made = prepare()
    clip(*made)
    after = step(*made)
    before = step(*prepare())
    assert_some_and_some(at_every_line(prepare, clip, step), before, after)


def test_a_callable_ema_decay_is_followed_on():
    """What half of an update leaves in the groups would pass for the program's own numbers."""

    def prepare():
        first, second = new_params()
        groups = [{"params": [first]}, {"params": [second]}]
        optimizer = warpstep.AdamW(groups, lr=LR, ema_decay=lambda step: 1 - 1 / (step + 2))
        set_grads((first, second), 0)
        optimizer.step()
        return optimizer, [first, second]

    def decays_of_the_next_step(optimizer, params):
        set_grads(params, 1)
        optimizer.step()
        expected = 1 - 1 / (optimizer._ema_steps + 1)
        return [group["ema_decay"] == expected for group in optimizer.param_groups]

    for found in at_every_line(prepare, lambda o, _: o.step(), decays_of_the_next_step):
        assert found == [True, True]


@pytest.mark.parametrize("options", [{}, {"master": "residual"}], ids=["plain", "master"])
def test_swap_ema_restores_the_parameters(options):
    dtypes = (torch.bfloat16,) * 3

    def prepare():
        params = new_params(dtypes)
        optimizer = warpstep.AdamW(params, lr=LR, ema_decay=0.5, **options)
        for seed in range(2):
            set_grads(params, seed)
            optimizer.step()
        return optimizer, params

    def swap(optimizer, _):
        with optimizer.swap_ema():
            pass

    def values_and_a_step(optimizer, params):
        found = values_of(params)
        optimizer.step()
        return [*found, *values_of(params)]

    expected = values_and_a_step(*prepare())
    for found in at_every_line(prepare, swap, values_and_a_step):
        for value, wanted in zip(found, expected, strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("with_scheduler", [False, True])
def test_replace_changes_all_or_nothing(with_scheduler):
    def prepare():
        params = new_params()
        optimizer = torch.optim.AdamW(params, lr=LR)
        set_grads(params, 0)
        optimizer.step()
        if with_scheduler:
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return optimizer, params

    def class_and_step(optimizer, params):
        set_grads(params, 1)
        optimizer.step()
        is_ours = isinstance(optimizer, warpstep.AdamW)
        return [torch.tensor(is_ours), *values_of(params)]

    before = class_and_step(*prepare())
    made = prepare()
    warpstep.replace(made[0])
    after = class_and_step(*made)
    found = at_every_line(prepare, lambda optimizer, _: warpstep.replace(optimizer), class_and_step)
    assert_some_and_some(found, before, after)


def scope():
    with warpstep.enabled():
        pass


def on_and_off():
    warpstep.enable()
    warpstep.disable()


@pytest.mark.parametrize(
    "call", [scope, on_and_off, warpstep.enable], ids=lambda call: call.__name__
)
def test_enabling_is_undone_as_a_whole(call):
    """After a signal at any line torch's own functions come back."""
    warpstep.disable()
    functions = own_functions()
    for line in itertools.count():
        came, _ = interrupted_at(line, call)
        if call is scope:
            assert override._scopes == 0, f"line {line}"
        warpstep.disable()
        assert own_functions() == functions, f"line {line}"
        assert not override.is_enabled()
        if not came:
            return


def own_functions():
    module = importlib.import_module("torch.optim.adam")  # no attribute of torch.optim
    cells = [cell.cell_contents for cell in torch.optim.Adam.step.__closure__ or ()]
    return [id(function) for function in (module._fused_adam, *cells)]


class Rate:
    """A learning rate that an interruption comes in the way of, once."""

    def __init__(self):
        self.asked = 0
        self.raises = False

    def __float__(self):
        if self.raises:
            self.raises = False
            raise InterruptionExit
        return LR

    def __ge__(self, other):
        return other <= LR

    def __le__(self, other):
        return other >= LR


class InterruptionExit(BaseException):
    """As KeyboardInterrupt: no Exception."""


def test_an_interruption_while_a_hyper_parameter_is_read_is_not_lost():
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR)
    set_grads(params, 0)
    rate = Rate()
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    before = values_of(params)
    rate.raises = True
    with pytest.raises(InterruptionExit):
        optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)
    optimizer.step()


def test_the_handler_of_this_module_raises():
    with pytest.raises(InterruptionError):
        signal.raise_signal(signal.SIGUSR1)
