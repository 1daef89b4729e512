"""Operations of Triton's interpreter that remember what they do to arguments of which types.

An operation of Triton's language works out types, casts and broadcasts, and then calls a builder,
which in the interpreter computes with NumPy. What it calls does not depend on the numbers, as it
cannot where the builder is a compiler's; but to work it out takes several times as long as to
compute. So the calls are taken down once for arguments of the same types, and repeated. An
operation that asks a tensor for its numbers meanwhile is not remembered.
"""

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

# Arguments that are what they are written as; floats have -0.0 and NaN.
PLAIN = (int, bool, str, type(None))
# Of constants alone, what these return is a constant too.
PURE = ("create_splat", "create_make_range")


class Recorder:
    """Stands for the builder while an operation's calls are taken down, and passes them on."""

    def __init__(self, builder: Any, handles: list[TensorHandle]) -> None:
        self.builder = builder
        self.handles = list(handles)  # by place: the arguments', then what each call returned
        self.places = {id(handle): place for place, handle in enumerate(handles)}
        self.constants: list[Any] = []
        # By name, as a test may replace one.
        self.calls: list[tuple[str, list[Any], list[tuple[int, int]]]] = []
        self.is_whole = True  # nothing was seen that a repetition would not do

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.builder, name)
        if name.startswith("get_"):  # a type, or a number that is written there
            return lambda *args: self.constant(member(*args))
        if name.startswith("create_"):
            return lambda *args: self.call(name, member, args)
        return member

    def constant(self, value: Any) -> Any:
        self.constants.append(value)
        return value

    def call(self, name: str, member: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        result = member(*args)
        places = [(i, self.places[id(x)]) for i, x in enumerate(args) if id(x) in self.places]
        fixed = [x for x in args if id(x) not in self.places]
        self.is_whole &= all(self.is_constant(x) for x in fixed)
        if name in PURE and not places:
            return self.constant(result)
        self.calls.append((name, list(args), places))
        if isinstance(result, TensorHandle):
            self.places[id(result)] = len(self.handles)
        self.handles.append(result)
        return result

    def is_constant(self, x: Any) -> bool:
        if isinstance(x, (list, tuple)):
            return all(map(self.is_constant, x))
        return not isinstance(x, TensorHandle) or any(x is c for c in self.constants)


class UnknownError(Exception):
    """An argument of which nothing is remembered."""


def part_of(x: Any) -> Any:
    """What of an argument that is no tensor tells which calls there are."""
    kind = type(x)
    if kind in PLAIN:
        return kind, x
    if kind is float:
        return kind, x.hex()
    if kind is tl.constexpr:
        return kind, part_of(x.value)
    if isinstance(x, tl.dtype):
        return tl.dtype, x.name
    if kind in (list, tuple, tl.tuple):
        return kind, *map(part_of, x)
    raise UnknownError


def remembering(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, with a memory."""
    remembered: dict[Any, Callable[..., Any] | None] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_semantic", None)
        if type(interpreter_semantic.builder) is Recorder:  # within another operation
            return operation(*args, **kwargs, _semantic=interpreter_semantic)
        tensors, key = [], []
        try:
            for x in args + tuple(kwargs.values()) if kwargs else args:
                if type(x) is tl.tensor:
                    tensors.append(x)
                    key.append(x.type.name)
                else:
                    key.append(part_of(x))
        except UnknownError:
            return operation(*args, **kwargs, _semantic=interpreter_semantic)
        key = (*key, *kwargs) if kwargs else tuple(key)
        if key not in remembered:
            result, remembered[key] = recorded(operation, args, kwargs)
            return result
        repeat = remembered[key]
        if repeat is None:
            return operation(*args, **kwargs, _semantic=interpreter_semantic)
        return repeat(*tensors)

    return run


def recorded(
    operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[..., Any] | None]:
    """What an operation returns, and what does the same to other tensors: None, if that varies."""
    given, tensors = [], []
    for x in (*args, *kwargs.values()):
        if type(x) is tl.tensor:  # a handle of its own: other arguments need not be the same twice
            tensors.append(x)
            x = tl.tensor(TensorHandle(x.handle.data, x.handle.dtype), x.type)
        given.append(x)
    copies = [x for x in given if type(x) is tl.tensor]
    builder = interpreter_semantic.builder
    recorder = interpreter_semantic.builder = Recorder(builder, [x.handle for x in copies])
    try:
        named = dict(zip(kwargs, given[len(args) :], strict=True))
        result = operation(*given[: len(args)], **named, _semantic=interpreter_semantic)
    finally:
        interpreter_semantic.builder = builder

    same = next((place for place, copy in enumerate(copies) if copy is result), None)
    if same is not None:
        does_nothing = recorder.is_whole and not recorder.calls
        return tensors[same], (lambda *tensors: tensors[same]) if does_nothing else None
    if type(result) is not tl.tensor or not recorder.is_whole:
        return result, None
    place = recorder.places.get(id(result.handle))
    if place is None and not recorder.is_constant(result.handle):
        return result, None
    return result, repetition(recorder, len(copies), place, result)


def repetition(recorder: Recorder, arguments: int, place: int | None, result: tl.tensor) -> Any:
    """A function that repeats the calls, and returns a tensor as the result is, with what the call
    at that place returned: None for a constant. Made of text, because a loop takes longer.
    """
    names = {"tensor": tl.tensor, "new": tl.tensor.__new__, "attributes": dict(result.__dict__)}
    names["builder"] = recorder.builder
    lines = [f"def repeat({', '.join(f't{i}' for i in range(arguments))}):"]
    lines += [f"    h{i} = t{i}.handle" for i in range(arguments)]
    for at, (name, args, places) in enumerate(recorder.calls, arguments):
        names |= {f"c{at}_{i}": x for i, x in enumerate(args)}
        given = [f"c{at}_{i}" for i in range(len(args))]
        for i, where in places:
            given[i] = f"h{where}"
        lines.append(f"    h{at} = builder.{name}({', '.join(given)})")
    lines.append("    made = new(tensor)")
    handle = "" if place is None else f", 'handle': h{place}"
    lines.append(f"    made.__dict__ = {{**attributes{handle}}}")
    lines.append("    return made")
    exec("\n".join(lines), names)
    return names["repeat"]


def asking(member: Callable[..., Any]) -> Callable[..., Any]:
    """A way to ask a tensor for its numbers, on which an operation's calls may depend."""

    def ask(self: tl.tensor) -> Any:
        if type(interpreter_semantic.builder) is Recorder:
            interpreter_semantic.builder.is_whole = False
        return member(self)

    return ask
