"""What types and docstrings promise of options, reports and statistics."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest
import torch

import warpstep
from support.environment import EMULATED
from warpstep import adam, backends, functional, hypers, lists, report, statistics

CLASSES = [warpstep.AdamW, warpstep.Adam]


@pytest.mark.parametrize("cls", CLASSES)
def test_choices_are_literal_types(cls):
    hints = typing.get_type_hints(cls.__init__, vars(adam))
    assert typing.get_args(hints["backend"]) == ("auto", *backends.BACKENDS)
    forms, none = typing.get_args(hints["decay_form"])
    assert typing.get_args(forms) == hypers.DECAY_FORMS
    assert none is type(None)
    hints = typing.get_type_hints(functional.adamw_)
    assert set(typing.get_args(hints["backend"])) == {"auto", "cpu", "cuda", "reference"}


@pytest.mark.skipif(EMULATED, reason="the CUDA source runs on the CPU here")
def test_the_error_can_be_caught_by_its_public_name():
    assert "BackendUnavailableError" in warpstep.__all__
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    with pytest.raises(warpstep.BackendUnavailableError, match="Or use backend='auto'"):
        warpstep.AdamW([param], backend="cuda").step()


@pytest.mark.parametrize("name", lists.OPERATORS)
def test_operators_have_the_functions_docstrings(name):
    operator = getattr(torch.ops.warpstep, name)
    for documented in (operator, operator.default, operator.tensor_lr):
        assert f"warpstep.functional.{name}" in documented.__doc__
        assert "weight_decay * p" in documented.__doc__


@pytest.mark.parametrize("kind", [report.Status, statistics.Statistics])
def test_every_field_of_a_report_is_described(kind):
    for field in dataclasses.fields(kind):
        assert f"\n        {field.name}: " in kind.__doc__, field.name


def reference_lines(params, twice=False, **options):
    """What `print(optimizer.plan)` says of the parameters that the reference steps."""
    optimizer = warpstep.AdamW(params, **options)
    stepped = optimizer.param_groups[0]["params"]
    for p in stepped:
        p.grad = torch.ones_like(p)
    if twice:
        stepped += stepped
    optimizer.step()
    lines = str(optimizer.plan).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("reference: "))
    return lines[at:]


def test_a_plan_tells_what_the_reference_steps_and_why():
    plain = torch.nn.Parameter(torch.ones(3))
    gaps = torch.ones(4, 2)[:, 0].requires_grad_()
    assert reference_lines([("plain", plain), ("gaps", gaps)], backend="cpu") == [
        "reference: 1 tensors",
        "  parameter 1 of group 0 ('gaps'): its memory has gaps: strides (2,) for shape (4,)",
    ]
    assert reference_lines([plain], state_dtype=torch.float64, backend="cpu") == [
        "reference: 1 tensors",
        "  parameter 0 of group 0: the cpu backend has no kernel for float32, float32 gradients, "
        "float64 moments",
    ]
    assert reference_lines([plain], twice=True, backend="cpu") == [
        "reference: 1 tensors",
        "  parameter 1 of group 0: the optimizer has it a second time, which is stepped after the "
        "first",
    ]
    many = [torch.nn.Parameter(torch.ones(1)) for _ in range(10)]
    count, line = reference_lines(many, backend="reference")
    assert count == "reference: 10 tensors"
    assert line.startswith("  parameter 0 of group 0, parameter 1 of group 0, ")
    assert "parameter 7 of group 0 and 2 more: the reference backend was asked for" in line


def test_every_form_of_decay_has_its_formula():
    for form in hypers.DECAY_FORMS:
        assert f'* ``"{form}"``' in warpstep.AdamW.__doc__, form


def test_statistics_have_names(backend):
    weight, bias, empty = (torch.nn.Parameter(torch.ones(s)) for s in [(3, 2), (3,), (2,)])
    odd = torch.ones(4, 2)[:, 0].requires_grad_()  # gaps in memory: the reference's
    for p in (weight, bias, odd):
        p.grad = torch.full_like(p, p.dim())

    def names(params):
        optimizer = warpstep.AdamW(params, stats=True, backend=backend)
        optimizer.step()
        found = optimizer.statistics()
        assert len(found.names) == len(found.params) == len(found.grad_norm)
        return {id(p): name for p, name in zip(found.params, found.names, strict=True)}

    named = names([("w", weight), ("b", bias), ("e", empty), ("o", odd)])
    assert named == {id(weight): "w", id(bias): "b", id(odd): "o"}
    unnamed = names([{"params": [weight]}, {"params": [empty, bias]}, {"params": odd}])
    assert unnamed == {
        id(weight): "parameter 0 of group 0",
        id(bias): "parameter 1 of group 1",
        id(odd): "parameter 0 of group 2",
    }


def test_what_is_added_to_named_parameters_by_hand_has_no_name(backend):
    """A list that somebody edits has more parameters than names. Torch steps it, and saves it."""
    a, b, c = (torch.nn.Parameter(torch.ones(n)) for n in (1, 2, 3))
    optimizer = warpstep.AdamW([("a", a), ("b", b)], stats=True, backend=backend)
    params = optimizer.param_groups[0]["params"]

    def names():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        found = optimizer.statistics()
        return {len(p): name for p, name in zip(found.params, found.names, strict=True)}

    assert names() == {1: "a", 2: "b"}
    params.append(c)
    assert names() == {1: "a", 2: "b", 3: "parameter 2 of group 0"}
    c.grad = torch.ones(4)[:3].to_sparse()
    with pytest.raises(RuntimeError, match="parameter 2 of group 0 has a gradient of layout"):
        optimizer.step()
    # Nobody knows whose the names are that are left over.
    del params[0], params[1], optimizer.state[a], optimizer.state[c]
    assert names() == {2: "parameter 0 of group 0"}


def arguments_in_stub(function):
    """The names of a function's arguments in a stub; `self` apart."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg != "self"]


def arguments_in_module(function):
    """The same of the module's, from pybind11's docstring, where `arg0` stands for no name."""
    (listed,) = re.findall(r"^\w+\((.*)\) -> ", function.__doc__, re.MULTILINE)
    return [name for name in re.findall(r"(\w+): ", listed) if name != "self"]


def assert_stub_is_of(found, body, where):
    """The names of `body` are those that a module or class has, and functions' arguments agree."""
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    values = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    public = {name for name in vars(found) if name == "__init__" or not name.startswith("_")}
    assert {*functions, *classes, *values} == public, where
    for name, node in functions.items():
        expected = arguments_in_module(getattr(found, name))
        stated = arguments_in_stub(node)
        assert len(stated) == len(expected), (where, name)
        for one, other in zip(stated, expected, strict=True):
            assert one == other or re.fullmatch(r"arg\d+", other), (where, name)
    for name, node in classes.items():
        assert_stub_is_of(getattr(found, name), node.body, name)


def test_the_stub_is_the_native_modules():
    module, _ = backends.native()
    stub = Path(warpstep.__file__).with_name("_native.pyi")
    assert_stub_is_of(module, ast.parse(stub.read_text()).body, "_native")
