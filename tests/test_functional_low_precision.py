"""Low precision in warpstep.functional: the class's bits; ranges of a parameter; operators."""

import sys
import threading
import time
from itertools import pairwise

import pytest
import torch

import warpstep
from support.lists import HYPERS
from support.low_precision import BF16, RECIPES
from support.low_precision_lists import (
    CLASS,
    SHAPES,
    give_grads,
    grads_of,
    lists_of,
    operator_arguments,
    rounding_of,
    stepped,
)
from support.modes import Dispatched
from support.parameters import random
from warpstep.functional import adam_, adamw_, sgd_

each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture
def lists_backend(backend):
    if backend == "triton":
        pytest.skip("Triton takes no lists")
    return backend


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for i, (a, b) in enumerate(zip(found[name], tensors, strict=True)):
            assert torch.equal(a, b), f"{name}[{i}]"


def call(function, lists, grads, **options):
    if function is not sgd_:
        lists = {"max_exp_avg_sqs": [], **lists}
    function(grads=grads, **lists, **options)


# ---- The bits of the class


@each_recipe
@pytest.mark.parametrize("case", ["adamw", "adam-amsgrad", "sgd"])
def test_bits_of_the_class(lists_backend, device, recipe, case):
    """Every recipe that a class has: parameters, residuals, moments, scales and counters."""
    options = {**CLASS, **recipe}
    if case == "sgd":
        options = {"lr": 1e-2, "momentum": 0.9, "seed": options["seed"], **recipe}
        if isinstance(recipe.get("state_dtype"), tuple):
            options["state_dtype"] = recipe["state_dtype"][0]
        kind, function = warpstep.SGD, sgd_
        hypers = {"lr": 1e-2, "weight_decay": 0.0, "momentum": 0.9, "dampening": 0.0}
    elif case == "adamw":
        kind, function, hypers = warpstep.AdamW, adamw_, HYPERS
    else:
        kind, function, hypers = warpstep.Adam, adam_, {**HYPERS, "amsgrad": True}
        options["amsgrad"] = True
    optimizer = stepped(kind, lists_backend, device, **options)
    lists = lists_of(optimizer)
    for step in (2, 3):
        give_grads(optimizer, step)
        before = warpstep.status().launches
        optimizer.step()
        between = warpstep.status().launches
        call(
            function,
            lists,
            grads_of(optimizer),
            **hypers,
            rounding=rounding_of(recipe, function is not sgd_),
            seed=options["seed"],
            backend=lists_backend,
        )
        after = warpstep.status().launches
        for backend in after:  # nothing is left to the reference
            assert after[backend] - between[backend] == between[backend] - before[backend]
    assert_same(lists, lists_of(optimizer))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16], ids=str)
def test_copies(lists_backend, device, dtype, grad_dtype):
    """float32 masters of what a model computes with: gradients of 16 bits in, copies out."""
    optimizer = stepped(
        warpstep.AdamW, lists_backend, device, dtype=torch.float32, copies=dtype, **CLASS
    )
    lists = lists_of(optimizer)
    give_grads(optimizer, 2, grad_dtype)
    optimizer.step()
    call(adamw_, lists, grads_of(optimizer), **HYPERS, backend=lists_backend)
    assert_same(lists, lists_of(optimizer))
    for param, copy in zip(lists["params"], lists["copies"], strict=True):
        assert torch.equal(copy, param.to(dtype))


def test_what_a_parameter_is_called_and_where_it_begins_decide_the_bits(lists_backend, device):
    """Tensors in another order, with their numbers, have the bits that they had."""
    recipe = RECIPES["stochastic-8bit"]
    optimizer = stepped(warpstep.AdamW, lists_backend, device, **CLASS, **recipe)
    lists, n = lists_of(optimizer), len(SHAPES)
    lists = {name: tensors[::-1] for name, tensors in lists.items()}
    give_grads(optimizer, 2)
    optimizer.step()
    options = {"rounding": "stochastic", "seed": CLASS["seed"], "backend": lists_backend}
    numbers = list(range(n))[::-1]
    other = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    grads = grads_of(optimizer)[::-1]
    call(adamw_, lists, grads, **HYPERS, **options, param_indices=numbers)
    lists = {name: tensors[::-1] for name, tensors in lists.items()}
    assert_same(lists, lists_of(optimizer))
    call(adamw_, other, grads, **HYPERS, **options)
    assert not torch.equal(other["params"][-1], lists["params"][0])


@pytest.mark.parametrize("recipe", ["stochastic", "residual"])
def test_gaps_in_memory(lists_backend, device, recipe):
    """What has no kernel is stepped by the reference: the bits of the same without gaps."""
    wide = random((6, 64), 0, device).to(BF16)
    param = wide[:, ::2]
    lists = {
        "params": [param],
        "exp_avgs": [torch.zeros(param.shape, device=device)],
        "exp_avg_sqs": [torch.zeros(param.shape, device=device, dtype=BF16)],
        "state_steps": [torch.zeros((1, 1), device=device)],
    }
    if recipe == "residual":
        lists["residuals"] = [torch.zeros_like(param, dtype=torch.int16)]
    dense = {name: [t.clone().contiguous() for t in ts] for name, ts in lists.items()}
    grads, kept = [random(param.shape, 5, device).to(BF16)], wide[:, 1::2].clone()
    options = {"rounding": "stochastic", "seed": 3}
    call(adamw_, lists, grads, **HYPERS, **options, backend=lists_backend)
    call(adamw_, dense, grads, **HYPERS, **options, backend="reference")
    assert_same(lists, dense)
    assert torch.equal(wide[:, 1::2], kept)


def test_behind_gaps_a_parameter_keeps_its_number(lists_backend, device):
    """Random bits are those of its place, also where a kernel takes it and not the one before."""
    wide = random((9, 2), 0, device).to(BF16)
    params = [wide[:, 0], random((64,), 1, device).to(BF16)]
    lists = {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "state_steps": [torch.zeros((), device=device) for _ in params],
    }
    alone = {name: [tensors[1].clone()] for name, tensors in lists.items()}
    grads = [random(p.shape, 5, device).to(BF16) for p in params]
    options = {**HYPERS, "rounding": "stochastic", "seed": 3, "backend": lists_backend}
    call(adamw_, lists, grads, **options)
    call(adamw_, alone, grads[1:], **options, param_indices=[1])
    assert_same({name: tensors[1:] for name, tensors in lists.items()}, alone)


# ---- Ranges of a parameter, as offloaders step them

RANGES = [(0, 64), (64, 20_032), (20_032, 66_000)]


def flat_recipe(recipe, backend, device, numel=66_000):
    """An optimizer of one flat parameter that has stepped once, its lists, and a gradient."""
    copies = {"dtype": torch.float32, "copies": BF16}
    options = copies if recipe == "copies" else RECIPES[recipe]
    optimizer = stepped(
        warpstep.AdamW, backend, device, steps=1, shapes=[(numel,)], **CLASS, **options
    )
    give_grads(optimizer, 1, BF16)
    return optimizer, lists_of(optimizer), grads_of(optimizer)[0]


def step_range(lists, grad, begin, end, recipe, first=0, **options):
    """One range of a flat parameter, whose step has been counted; `first` is its own first."""
    some = {}
    for name, (tensor,) in lists.items():
        if name == "state_steps":
            some[name] = [tensor]
        elif name.endswith("_scales"):
            some[name] = [tensor[begin // 64 : -(-end // 64)]]
        else:
            some[name] = [tensor[begin:end]]
    call(
        adamw_,
        some,
        [grad[begin:end]],
        **HYPERS,
        rounding=rounding_of(RECIPES.get(recipe, {})),
        seed=CLASS["seed"],
        first_elements=[first + begin],
        advance_steps=False,
        **options,
    )


@pytest.mark.parametrize("recipe", ["residual-8bit", "stochastic-8bit", "stochastic", "copies"])
def test_ranges_have_the_bits_of_the_whole(lists_backend, device, recipe):
    """In any order, with one counter that the caller has advanced once."""
    optimizer, lists, grad = flat_recipe(recipe, lists_backend, device)
    lists["state_steps"][0] += 1
    for begin, end in RANGES[::-1]:
        step_range(lists, grad, begin, end, recipe, backend=lists_backend)
    optimizer.step()
    assert_same(lists, lists_of(optimizer))


def test_ranges_of_no_blocks_begin_anywhere(lists_backend, device):
    """Eight elements draw together, and may be parted."""
    optimizer, lists, grad = flat_recipe("stochastic", lists_backend, device)
    lists["state_steps"][0] += 1
    for begin, end in ((0, 3), (3, 1_029), (1_029, 66_000)):
        step_range(lists, grad, begin, end, "stochastic", backend=lists_backend)
    optimizer.step()
    assert_same(lists, lists_of(optimizer))


@pytest.mark.parametrize("recipe", ["stochastic", "stochastic-8bit"])
def test_a_range_in_which_the_numbers_of_draws_pass_32_bits(lists_backend, device, recipe):
    """Eight elements draw together: at element 2^35. As two ranges, neither of which passes it."""
    _, lists, grad = flat_recipe(recipe, lists_backend, device)
    parted = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    middle, end = 33_024, 66_000
    of = {"recipe": recipe, "first": 2**35 - middle, "backend": lists_backend}
    step_range(lists, grad, 0, end, **of)
    step_range(parted, grad, 0, middle, **of)
    step_range(parted, grad, middle, end, **of)
    assert_same(lists, parted)


@pytest.mark.parametrize("recipe", ["copies", "stochastic-8bit"])
def test_ranges_from_several_threads(recipe):
    """At once, large enough for each to let go of the GIL: the bits of the whole."""
    numel = 2**19 + 64 * 3
    optimizer, lists, grad = flat_recipe(recipe, "cpu", "cpu", numel)
    lists["state_steps"][0] += 1
    bounds = [0, 2**17, 2**18, 2**18 + 2**17, numel]
    failed = []

    def step(begin, end):
        try:
            step_range(lists, grad, begin, end, recipe)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=step, args=pair) for pair in pairwise(bounds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    optimizer.step()
    assert_same(lists, lists_of(optimizer))


@pytest.mark.parametrize("elements", [2**17, 2**22 + 64], ids=["a chunk", "all"])
def test_another_thread_runs_while_kernels_do(elements):
    """The GIL is not held: another thread, which takes it only when it is let go, counts."""
    lists = {
        "params": [torch.zeros(elements)],
        "exp_avgs": [torch.zeros(elements)],
        "exp_avg_sqs": [torch.zeros(elements)],
        "state_steps": [torch.zeros(())],
    }
    grads, count, done = [torch.ones(elements)], 0, False

    def counting():
        nonlocal count
        while not done:
            count += 1
            time.sleep(0)  # lets go of the GIL

    before_interval = sys.getswitchinterval()
    other = threading.Thread(target=counting)
    try:
        sys.setswitchinterval(1000.0)  # nobody has to let go of it
        other.start()
        for _ in range(2000):  # until the other thread has had a core meanwhile
            before = count
            call(adamw_, lists, grads, **HYPERS)
            if count != before:
                break
        assert count != before
    finally:
        done = True
        sys.setswitchinterval(before_interval)
        other.join()


# ---- Operators of torch


def test_opcheck():
    """Schema, fake implementation, autograd registration and AOT dispatch hold."""
    lists, options = operator_arguments()
    torch.library.opcheck(torch.ops.warpstep.adamw_.default, lists, options)
    lists, options = operator_arguments()
    options = {key: options[key] for key in HYPERS} | {"copies": [p.bfloat16() for p in lists[0]]}
    lists = [[t.float() for t in stream] for stream in lists]
    torch.library.opcheck(torch.ops.warpstep.adam_.default, tuple(lists), options)


@pytest.mark.parametrize("called", [adamw_, torch.ops.warpstep.adamw_], ids=["function", "op"])
@pytest.mark.parametrize("recipe", ["residual-8bit", "stochastic-8bit"])
def test_compiled_and_as_an_operator(called, recipe):
    """Whole under fullgraph=True, and of the eager call's bits."""

    def step(lists, options):
        called(*lists, **{**options, "seed": 2**63 - 1})
        return [param * 2 for param in lists[0]]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = operator_arguments(recipe), operator_arguments(recipe)
    for _ in range(2):
        assert all(map(torch.equal, compiled(*found), step(*expected)))
    for a, b in zip(found[0], expected[0], strict=True):
        assert all(map(torch.equal, a, b))
    for name in {*found[1]} - {*HYPERS, "rounding", "seed", "param_indices"}:
        assert all(map(torch.equal, found[1][name], expected[1][name])), name


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_the_operator_takes_any_seed(seed):
    """A seed above torch's integers has the same bits where an operator is seen."""
    found, expected = operator_arguments("stochastic"), operator_arguments("stochastic")
    with Dispatched() as mode:
        adamw_(*found[0], **{**found[1], "seed": seed})
    assert mode.seen == ["warpstep.adamw_.default"]
    adamw_(*expected[0], **{**expected[1], "seed": seed})
    assert all(map(torch.equal, found[0][0], expected[0][0]))


@pytest.mark.parametrize("steps", ["own", "shared"])
@pytest.mark.parametrize("recipe", ["residual-8bit", "stochastic-8bit", "residual"])
def test_vmap(recipe, steps):
    """A batch has the bits of its entries, one after the other."""
    size, (lists, options) = 3, operator_arguments(recipe)
    numbers = {key: options.pop(key) for key in (*HYPERS, "rounding", "seed", "param_indices")}

    def stack(tensors):
        return [torch.stack([t] * size) for t in tensors]

    batch = [stack(stream) for stream in lists]
    batch[1] = [random(g.shape, i).to(g.dtype) for i, g in enumerate(batch[1])]
    batch[5] = [torch.tensor([1.0, 2.0, 5.0]) for _ in lists[5]] if steps == "own" else lists[5]
    low = {name: stack(stream) for name, stream in options.items()}
    entries = []
    for b in range(size):
        one = [[t[b].clone() if t.dim() else t.clone() for t in stream] for stream in batch]
        of_low = {name: [t[b].clone() for t in stream] for name, stream in low.items()}
        adamw_(*one, **numbers, **of_low)
        entries.append((one, of_low))

    def step(lists, low):
        adamw_(*lists, **numbers, **low)
        return lists[0][0] * 1

    dims = [[0] * len(stream) for stream in batch[:5]] + [[0 if steps == "own" else None] * 2]
    torch.vmap(step, in_dims=(dims, 0))(batch, low)
    for b, (one, of_low) in enumerate(entries):
        for stream, expected in zip(batch, one, strict=True):
            for t, e in zip(stream, expected, strict=True):
                assert torch.equal(t[b] if t.dim() > e.dim() else t, e)
        for name, expected in of_low.items():
            assert all(torch.equal(t[b], e) for t, e in zip(low[name], expected, strict=True))
