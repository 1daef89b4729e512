"""What Megatron-Core's DistributedOptimizer does with Transformer Engine's FusedAdam, on the CPU.

Megatron needs a GPU. So this is what it asks of the optimizer that it is given, in its order
(megatron/core/optimizer: ``__init__.py``, ``distrib_optimizer.py``, as of August 2026): constructed
on a model's parameters, whose groups it then replaces by flat shards of them; states that it makes,
saves and loads; gradients under another name.
"""

import copy

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.tolerance import bound
from warpstep.compat import FusedAdam

LR, STEPS, RANKS = 0.01, 3, 2
OPTIONS = {"lr": LR, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
SHAPES = ((4, 8), (8,), (3, 5), (1,))
MODES = {
    "masters": {"master_weights": True, "use_decoupled_grad": True},
    "remainders": {
        "master_weights": True,
        "use_decoupled_grad": True,
        "store_param_remainders": True,
    },
    "moments-bfloat16": {
        "master_weights": True,
        "use_decoupled_grad": True,
        "store_param_remainders": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    },
}


@pytest.fixture(params=MODES.values(), ids=MODES)
def options(request):
    return request.param


class Model:
    """Parameters that are views of one buffer, as Megatron's are; and a buffer of gradients."""

    def __init__(self, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(3)
        self.values = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
        self.buffer = torch.cat([v.flatten() for v in self.values]).to(dtype)
        self.grads = torch.zeros(self.buffer.numel())
        self.params, self.ranges, at = [], [], 0
        for value in self.values:
            param = Parameter(torch.empty(value.shape, dtype=dtype))
            param.data = self.buffer[at : at + value.numel()].view(value.shape)
            self.params.append(param)
            self.ranges.append((at, at + value.numel()))
            at += value.numel()

    def backward(self, step):
        self.grads.copy_(torch.randn(self.grads.numel(), generator=seeded(step)))


def seeded(step):
    return torch.Generator().manual_seed(100 + step)


class DistributedOptimizer:
    """One rank's: it steps an even share of the buffer, which cuts parameters anywhere."""

    def __init__(self, model, rank, **options):
        self.model = model
        share = -(-model.buffer.numel() // RANKS)
        begin, end = rank * share, min((rank + 1) * share, model.buffer.numel())
        groups = [  # the second is of what has no decay
            {"params": model.params[::2], "wd_mult": 1.0},
            {"params": model.params[1::2], "wd_mult": 0.0, "weight_decay": 0.0},
        ]
        self.optimizer = FusedAdam(groups, **OPTIONS, **options)
        self.shards = []  # each with where its gradient is
        for index, group in enumerate(self.optimizer.param_groups):
            shards = []
            for param, (first, last) in zip(
                model.params[index::2], model.ranges[index::2], strict=True
            ):
                a, b = max(first, begin), min(last, end)
                shard = param.detach().view(-1)[a - first : max(b, a) - first]
                shards.append(shard)  # maybe empty
                self.shards.append((shard, a, max(b, a)))
            group["params"] = shards
        self.optimizer.param_groups = [dict(g) for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def step(self):
        for shard, a, b in self.shards:
            shard.decoupled_grad = self.model.grads[a:b]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def begin_states(self):
        """``_init_optimizer_states_with_dummy_values``."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.numel() > 0:
                    param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self):
        """``_get_main_param_and_optimizer_states``: of each shard that has elements."""
        found = []
        for shard, _, _ in self.shards:
            names = list(self.optimizer.state[shard])
            tensors = {n: self.optimizer.get_unscaled_state(shard, n) for n in names}
            tensors["param"] = tensors.pop("master_param")
            found.append({name: tensor.clone() for name, tensor in tensors.items()})
        return found

    def set_states(self, states):
        """``_set_main_param_and_optimizer_states``."""
        for (shard, _, _), tensors in zip(self.shards, states, strict=True):
            for name, tensor in tensors.items():
                name = "master_param" if name == "param" else name
                self.optimizer.set_scaled_state(shard, name, tensor)

    def saved_groups(self):
        """``state_dict``: counts of the groups must be one number."""
        state_dict = self.optimizer.state_dict()
        steps = {g["step"] for g in state_dict["param_groups"] if g["params"] and "step" in g}
        assert len(steps) <= 1
        assert all(type(step) is int for step in steps)
        step = steps.pop() if steps else None
        groups = [{k: v for k, v in g.items() if k != "params"} for g in state_dict["param_groups"]]
        for group in groups:
            if step is not None:
                group["step"] = int(step)
        return groups

    def load_groups(self, groups):
        """``load_state_dict``: empty tensors for states, which `set_states` fills later."""
        inner = self.optimizer.state_dict()
        dtypes = {"exp_avg": self.optimizer.exp_avg_dtype}
        dtypes["exp_avg_sq"] = self.optimizer.exp_avg_sq_dtype
        is_remainder = self.optimizer.store_param_remainders
        dtypes["master_param"] = torch.int16 if is_remainder else torch.float32
        state = inner["state"]
        if not self.optimizer.state:
            numbers = [n for group in inner["param_groups"] for n in group["params"]]
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: torch.empty(p.numel(), dtype=d) for name, d in dtypes.items()}
                for number, p in zip(numbers, params, strict=True)
            }
        merged = [
            {**group, "params": inner_group["params"]}
            for group, inner_group in zip(groups, inner["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": merged})


def train(model, ranks, steps, first=0):
    for step in range(first, first + steps):
        model.backward(step)
        for rank in ranks:
            rank.step()


def test_shards_train_the_model(options):
    """As torch's AdamW trains float32 parameters with the same gradients, rounded to bfloat16."""
    model = Model()
    train(model, [DistributedOptimizer(model, rank, **options) for rank in range(RANKS)], STEPS)
    wide = [Parameter(value.float()) for value in model.values]
    groups = [{"params": wide[::2]}, {"params": wide[1::2], "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(STEPS):
        flat = torch.randn(model.buffer.numel(), generator=seeded(step))
        for param, (a, b) in zip(wide, model.ranges, strict=True):
            param.grad = flat[a:b].view(param.shape)
        expected.step()
    # Moments in bfloat16 have its roundings, the others float32's; the parameters bfloat16's once.
    of_moments = options.get("exp_avg_dtype", torch.float32)
    for param, other, value in zip(model.params, wide, model.values, strict=True):
        assert not torch.equal(param, value)
        half_ulp = 2.0**-8 * other.abs().max().item()
        of_update = bound(STEPS, LR, other) + (
            bound(STEPS, LR, torch.zeros(1), of_moments) if of_moments != torch.float32 else 0
        )
        torch.testing.assert_close(param.float(), other.detach(), rtol=0, atol=half_ulp + of_update)


def test_each_rank_steps_in_one_launch(options):
    model = Model()
    rank = DistributedOptimizer(model, 0, **options)
    assert any(shard.numel() == 0 for shard, _, _ in rank.shards)
    train(model, [rank], 1)
    plan, before = rank.optimizer.plan, warpstep.status().launches["cpu"]
    train(model, [rank], STEPS, first=1)
    assert rank.optimizer.plan is plan
    assert warpstep.status().launches["cpu"] == before + STEPS


@pytest.mark.parametrize("begun", [False, True], ids=["loaded-into-empty", "loaded-into-begun"])
def test_a_resumed_run_goes_on_bit_for_bit(options, begun):
    model = Model()
    ranks = [DistributedOptimizer(model, rank, **options) for rank in range(RANKS)]
    train(model, ranks, STEPS)
    saved = [(copy.deepcopy(rank.saved_groups()), rank.states()) for rank in ranks]
    weights = model.buffer.clone()
    train(model, ranks, STEPS, first=STEPS)

    other = Model()
    resumed = [DistributedOptimizer(other, rank, **options) for rank in range(RANKS)]
    if begun:
        for rank in resumed:
            rank.begin_states()
    other.buffer.copy_(weights)
    for rank, (groups, states) in zip(resumed, saved, strict=True):
        rank.load_groups(groups)
        rank.set_states(states)
    assert [g["step"] for rank in resumed for g in rank.optimizer.param_groups] == [STEPS] * 4
    train(other, resumed, STEPS, first=STEPS)
    assert torch.equal(other.buffer, model.buffer)


def test_a_state_dict_loaded_where_it_was_made_changes_nothing(options):
    model, same = Model(), Model()
    one = DistributedOptimizer(model, 0, **options)
    other = DistributedOptimizer(same, 0, **options)
    train(model, [one], STEPS)
    train(same, [other], STEPS)
    one.optimizer.load_state_dict(one.optimizer.state_dict())
    train(model, [one], STEPS, first=STEPS)
    train(same, [other], STEPS, first=STEPS)
    assert torch.equal(model.buffer, same.buffer)


def test_states_are_made_by_a_step_without_gradients(options):
    model = Model()
    rank = DistributedOptimizer(model, 0, **options)
    before = model.buffer.clone()
    rank.begin_states()
    assert torch.equal(model.buffer, before)
    for shard, _, _ in rank.shards:
        assert sorted(rank.optimizer.state[shard]) == ["exp_avg", "exp_avg_sq", "master_param"]


def test_states_are_made_one_by_one(options):
    """``init_state_fn``, which names no option."""
    model = Model()
    rank = DistributedOptimizer(model, 0, **options)
    for group in rank.optimizer.param_groups:
        for param in group["params"]:
            if len(rank.optimizer.state[param]) == 0:
                rank.optimizer.initialize_state(param)
    same = Model()
    other = DistributedOptimizer(same, 0, **options)
    train(model, [rank], STEPS)
    train(same, [other], STEPS)
    assert torch.equal(model.buffer, same.buffer)


def test_float32_masters_of_megatrons_own():
    """Without the precision-aware optimizer: Megatron holds float32 shards and copies them back."""
    model = Model(torch.float32)
    rank = DistributedOptimizer(model, 0)
    for group in rank.optimizer.param_groups:
        for param in group["params"]:  # `init_state_fn`
            rank.optimizer.state[param]["exp_avg"] = torch.zeros_like(param.data)
            rank.optimizer.state[param]["exp_avg_sq"] = torch.zeros_like(param.data)
    same = Model(torch.float32)
    other = DistributedOptimizer(same, 0)
    for step in range(STEPS):
        for one in (rank, other):
            one.model.backward(step)
            for shard, a, b in one.shards:
                shard.grad = one.model.grads[a:b]
            one.optimizer.step()
    assert torch.equal(model.buffer, same.buffer)
    assert rank.optimizer.param_groups[0]["step"] == STEPS
