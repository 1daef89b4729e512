"""ema_state_dict(): a model's state dict with averages in place; ema_parameters()' aliases."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import warpstep

DECAY = 0.9


class Net(nn.Module):
    """Tied weights, buffers of two kinds, a frozen parameter, one without a gradient, a number."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)) + self.frozen)

    def get_extra_state(self):
        return {"a number": 3}

    def set_extra_state(self, state):
        assert state == {"a number": 3}


def train(net, optimizer, steps=4, after=lambda: None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(0, 6, (5,), generator=generator)
        net(tokens).float().square().mean().backward()
        optimizer.step()
        after()


def trained(dtype=torch.float32, steps=4, backend="auto", **options):
    net = Net().to(dtype)
    params = (p for p in net.parameters() if p.requires_grad)
    optimizer = warpstep.AdamW(params, lr=0.1, ema_decay=DECAY, backend=backend, **options)
    train(net, optimizer, steps)
    return net, optimizer


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert found._metadata == expected._metadata
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype, key
            assert not found[key].requires_grad, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_state_dict_inside_swap_ema(dtype, backend):
    net, optimizer = trained(dtype, backend=backend)
    before = copy.deepcopy(net.state_dict())
    versions = [p._version for p in net.parameters()]
    found = optimizer.ema_state_dict(net)
    assert_same(net.state_dict(), before)
    assert [p._version for p in net.parameters()] == versions
    with optimizer.swap_ema():
        assert_same(found, net.state_dict())
        assert_same(optimizer.ema_state_dict(net), net.state_dict())
    assert not torch.equal(found["head.weight"], before["head.weight"])
    assert found["head.weight"] is not found["embedding.weight"]
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    assert torch.equal(found["unused"], before["unused"])
    assert torch.equal(found["frozen"], before["frozen"])
    assert found["norm.num_batches_tracked"] == 4


def test_it_loads_into_another_model(tmp_path):
    net, optimizer = trained()
    torch.save(optimizer.ema_state_dict(net), tmp_path / "averages.pt")
    other = Net(seed=7)
    other.load_state_dict(torch.load(tmp_path / "averages.pt", weights_only=True))
    assert other.head.weight is other.embedding.weight
    tokens = torch.arange(6)
    with optimizer.swap_ema(), torch.no_grad():
        assert torch.equal(other.eval()(tokens), net.eval()(tokens))


def test_it_agrees_with_averaged_model():
    net = Net()
    optimizer = warpstep.AdamW(net.parameters(), lr=0.1, ema_decay=DECAY)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    train(net, optimizer, after=lambda: theirs.update_parameters(net))
    found = optimizer.ema_state_dict(net)
    expected = theirs.module.state_dict()
    assert found.keys() == expected.keys()
    for key in ("embedding.weight", "norm.weight", "norm.bias", "frozen", "unused"):
        bound = 4 * 4 * 2**-24 * float(expected[key].abs().max())  # as in test_averages.py
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=bound)


def test_a_wrapped_model_has_the_wrappers_keys():
    net, optimizer = trained()
    compiled = torch.compile(net)
    found = optimizer.ema_state_dict(compiled)
    assert list(found) == list(compiled.state_dict())
    with optimizer.swap_ema():
        assert_same(found, compiled.state_dict())


def test_a_part_of_the_model_and_a_group_without_averages():
    net = Net()
    head = {"params": [net.embedding.weight], "ema_decay": None}
    optimizer = warpstep.AdamW([{"params": net.norm.parameters()}, head], ema_decay=DECAY)
    train(net, optimizer)
    found = optimizer.ema_state_dict(net)
    assert torch.equal(found["head.weight"], net.head.weight)
    assert not torch.equal(found["norm.weight"], net.norm.weight)
    part = optimizer.ema_state_dict(net.norm)
    assert torch.equal(part["weight"], found["norm.weight"])
    assert list(part) == list(net.norm.state_dict())
    with pytest.raises(ValueError, match="averages none of the model's 1 parameters"):
        optimizer.ema_state_dict(net.head)


def test_before_the_first_step_it_is_the_models_own():
    net = Net()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=DECAY)
    assert_same(optimizer.ema_state_dict(net), net.state_dict())


def test_what_it_is_not_given():
    net, optimizer = trained()
    with pytest.raises(ValueError, match=r"none of the model's 5 parameters.*not a copy"):
        optimizer.ema_state_dict(copy.deepcopy(net))
    with pytest.raises(TypeError, match=r"of type OrderedDict, expected a torch\.nn\.Module"):
        optimizer.ema_state_dict(net.state_dict())
    plain = warpstep.AdamW(net.parameters())
    with pytest.raises(RuntimeError, match="no averages are kept"):
        plain.ema_state_dict(net)


def test_a_hook_that_hides_a_parameter():
    """Without its average there, the state dict would be that of no model."""
    net, optimizer = trained()

    def gathered(module, state_dict, prefix, metadata):
        state_dict[prefix + "norm.weight"] = state_dict[prefix + "norm.weight"].clone()

    net.register_state_dict_post_hook(gathered)
    with pytest.raises(ValueError, match=r"in place of 'norm.weight'.*inside `with optimizer"):
        optimizer.ema_state_dict(net)


def test_a_parameter_without_an_average_is_returned_as_an_alias(backend):
    """Like the averages, it requires no gradient; it shows what the parameter is, now and later."""
    net, optimizer = trained(backend=backend)
    found = optimizer.ema_parameters()
    alias = found[net.unused]
    assert alias is not net.unused
    assert not any(average.requires_grad for average in found.values())
    with torch.no_grad():
        net.unused.fill_(5)
    assert torch.equal(alias, torch.full((3,), 5.0))
