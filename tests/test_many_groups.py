"""Parameter groups are added as torch adds them, and in linear time while constructed."""

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer

import warpstep

PAIRS = [(warpstep.AdamW, torch.optim.AdamW), (warpstep.Adam, torch.optim.Adam)]


class Counted(Parameter):
    """Counts how often a set or a dict looks for one of its kind."""

    lookups = 0

    def __hash__(self):
        Counted.lookups += 1
        return id(self)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_construction_is_linear_in_the_groups(ours, theirs):
    def lookups(cls, groups):
        Counted.lookups = 0
        cls([{"params": [Counted(torch.zeros(1))]} for _ in range(groups)])
        return Counted.lookups

    few, many = lookups(ours, 50), lookups(ours, 500)
    assert many <= 10 * few + 10
    assert lookups(theirs, 500) > 20 * many  # what is counted is what grows


A, B, C = (Parameter(torch.full((2,), float(i))) for i in range(3))
HALF_BAD = Parameter(torch.ones(2)) * 2  # no leaf
GROUPS = {
    "none": [],
    "empty": [{"params": []}],
    "one": [{"params": A}],
    "three": [{"params": [A]}, {"params": B, "lr": 0.5}, {"params": iter([C])}],
    "empty-beside": [{"params": []}, {"params": [A]}, {"params": []}],
    "again": [{"params": [A]}, {"params": [B]}, {"params": [A]}],
    "again-at-once": [{"params": [A, B]}, {"params": [B]}],
    "twice-in-one": [{"params": [A]}, {"params": [B, B]}, {"params": [C]}],
    "twice-and-again": [{"params": [A]}, {"params": [A, A]}],
    "named": [{"params": [("a", A)]}, {"params": [("b", B), ("c", C)]}],
    "named-again": [{"params": [("a", A)]}, {"params": [("b", A)]}],
    "names-stop": [{"params": [("a", A)]}, {"params": [B]}],
    "names-begin": [{"params": [A]}, {"params": [B]}, {"params": [("c", C)]}],
    "names-missing": [{"params": [("a", A), B]}],
    "names-stop-and-again": [{"params": [("a", A)]}, {"params": [A]}],
    "set": [{"params": [A]}, {"params": {B}}],
    "no-tensor": [{"params": [A]}, {"params": [B, "c"]}],
    "no-leaf": [{"params": [A]}, {"params": [HALF_BAD]}],
    "no-params": [{"params": [A]}, {"lr": 0.5}],
    "no-dict": [{"params": [A]}, [B]],
    "number": [{"params": [A]}, {"params": 3}],
}


def outcome(make):
    """The groups made, or the error; and the warnings with the file that they are laid to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            groups = make().param_groups
            made = [
                {k: v if k != "params" else list(map(id, v)) for k, v in g.items()} for g in groups
            ]
        except Exception as error:
            made = (type(error), str(error))
    return made, [(str(w.message), w.category) for w in caught]


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_groups_and_errors_are_torchs(ours, theirs, case):
    def given():
        return [{**g} if isinstance(g, dict) else list(g) for g in GROUPS[case]]

    if case == "three":  # its iterator serves once
        GROUPS[case][2]["params"] = [C]
    assert outcome(lambda: ours(given())) == outcome(lambda: theirs(given()))

    def added_later(cls):
        optimizer = cls([Parameter(torch.zeros(1))])
        for group in given():
            optimizer.add_param_group(group)
        return optimizer

    mine, others = outcome(lambda: added_later(ours)), outcome(lambda: added_later(theirs))
    assert mine[1] == others[1]
    if isinstance(mine[0], list):
        assert mine[0][1:] == others[0][1:]
    else:
        assert mine == others


def test_a_group_that_was_edited_since_counts_as_it_is():
    optimizer = warpstep.AdamW([{"params": [A]}, {"params": [B]}])
    optimizer.param_groups[0]["params"] = [C]
    optimizer.add_param_group({"params": [A]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [C]})
    again = copy.deepcopy(optimizer)
    again.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert [len(g["params"]) for g in again.param_groups] == [1, 1, 1, 1]


class Seeing(warpstep.AdamW):
    """Looks at the groups before and after each is added."""

    def add_param_group(self, param_group):
        before = list(self.param_groups)
        super().add_param_group(param_group)
        assert self.param_groups[:-1] == before
        assert self.param_groups[-1] is param_group


class Splitting(warpstep.AdamW):
    """Makes a group of each parameter, past warpstep's own method."""

    def add_param_group(self, param_group):
        for param in param_group["params"]:
            Optimizer.add_param_group(self, {"params": [param]})


class Halving(warpstep.AdamW):
    """Adds half of the parameters past warpstep's own method, the others by it."""

    def add_param_group(self, param_group):
        first, *rest = param_group["params"]
        Optimizer.add_param_group(self, {"params": [first]})
        super().add_param_group({"params": rest})


@pytest.mark.parametrize("cls", [Seeing, Splitting, Halving])
def test_derived_classes_with_their_own_add_param_group(cls):
    optimizer = cls([{"params": [A, B]}, {"params": [C]}])
    assert [p for g in optimizer.param_groups for p in g["params"]] == [A, B, C]
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [A, B]}, {"params": [C, A]}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [A, B]}, {"params": [B, C]}])


def test_a_base_beneath_that_adds_groups_sees_all_of_them():
    seen = []

    class Beneath(Optimizer):
        def add_param_group(self, param_group):
            seen.append(len(self.param_groups))
            super().add_param_group(param_group)

    class Both(warpstep.AdamW, Beneath):
        pass

    Both([{"params": [A]}, {"params": [B]}, {"params": [C]}])
    assert seen == [0, 1, 2]


def test_torchs_method_patched_by_someone_sees_all_groups():
    seen, torchs = [], Optimizer.add_param_group

    def counting(self, param_group):
        seen.append(len(self.param_groups))
        torchs(self, param_group)

    with mock.patch.object(Optimizer, "add_param_group", counting):
        warpstep.AdamW([{"params": [A]}, {"params": [B]}, {"params": [C]}])
    assert seen == [0, 1, 2]


# ---- warpstep's classes in torch's place


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_torchs_name_for_it_may_be_ours(name, differentiable):
    ours, twin = torch.ones(3), torch.ones(3)
    expected = getattr(torch.optim, name)([twin.requires_grad_()], lr=0.1)
    with mock.patch.object(torch.optim, name, getattr(warpstep, name)):
        param = ours if differentiable else ours.requires_grad_()
        optimizer = getattr(torch.optim, name)([param], lr=0.1, differentiable=differentiable)
        assert type(optimizer) is getattr(warpstep, name)
        ours.grad, twin.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
        derived = type("Derived", (getattr(torch.optim, name),), {})([torch.ones(2)])
        assert isinstance(derived, getattr(warpstep, name))
    expected.step()
    torch.testing.assert_close(ours.detach(), twin.detach())


def test_replace_and_enable_while_torchs_names_are_ours():
    replaced = torch.optim.AdamW([Parameter(torch.ones(3))])
    theirs = torch.optim.AdamW([Parameter(torch.ones(3))], fused=True)
    with (
        mock.patch.object(torch.optim, "AdamW", warpstep.AdamW),
        mock.patch.object(torch.optim, "Adam", warpstep.Adam),
    ):
        assert type(warpstep.replace(replaced)) is warpstep.AdamW
        taken = warpstep.status().taken
        with warpstep.enabled():
            theirs.param_groups[0]["params"][0].grad = torch.ones(3)
            theirs.step()
        assert warpstep.status().taken == taken + 1
        warpstep.AdamW([torch.ones(2)])
        warpstep.Adam([torch.ones(2)])
