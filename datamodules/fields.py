"""What a constructor's field may hold, said once in its annotation and checked wherever an object is made.

    @checked
    class Noise:
        def __init__(self, rate: Share = 0.1, num_samples: Count = 1) -> None: ...

    Noise(rate=2.0)  # ValueError: Noise.rate: expected a number within (0, 1], got 2.0

The command line checks a configuration by the same function before anything is built, with the field's place
in the YAML in front. Every number must be finite, annotated or not; a bool is no number.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(1)]
"""How many of something there are; at least one."""
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
"""A part of a whole, not none of it."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""A part of a whole, not all of it."""

C = TypeVar("C", bound=type)
Test = Callable[[Any], bool]


def checked(cls: C) -> C:
    """Check a class's plain fields whenever it is made; for a dataclass, put this above `@dataclass`.

    Raises (when an object is made): ValueError `Class.field: expected ..., got ...` for the first field that
    does not fit.
    """
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checking(self: object, *args: Any, **kwargs: Any) -> None:
        # The constructor that the caller meant checks; a subclass's own hands on what it has checked.
        if type(self).__init__ is checking:
            hints = _hints(init)
            for name, value in signature.bind(self, *args, **kwargs).arguments.items():
                found = problem(value, hints[name]) if name in hints else None
                if found is not None:
                    raise ValueError(f"{type(self).__name__}.{name}: {found}")
        init(self, *args, **kwargs)

    cls.__init__ = checking  # type: ignore[misc]
    return cls


def constructor(cls: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Every named argument of a class's constructor with its annotation; those of a parent class too where
    it hands on `**kwargs`."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if init is None or owner is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        hints = _hints_or_none(init)
        kinds = {parameter.kind for parameter in parameters}
        for own in parameters:
            if own.kind not in (own.VAR_POSITIONAL, own.VAR_KEYWORD):
                found.setdefault(own.name, (own, hints.get(own.name, Any)))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def _hints_or_none(function: Any) -> dict[str, Any]:
    """The annotations, none where they name what only a type checker imports (Lightning's WandbLogger)."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        return {}


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def problem(value: Any, hint: Any) -> str | None:
    """Why a value does not fit an annotation, as `expected X, got Y`, or None.

    Only what is plain is checked: numbers, texts, booleans, None, literals, and lists, tuples and mappings of
    them.
    """
    test = fitting(hint)
    if test is None or test(value):
        return None
    inner = _inner_problem(value, hint)
    return inner or f"expected {describe(hint)}, got {value!r}"


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_plain(hint: Any) -> bool:
    """Whether values of this type are checked by `problem`."""
    return fitting(hint) is not None


def fitting(hint: Any) -> Test | None:
    """Whether a value fits an annotation, as a function for who asks of many values; None where it is not
    plain."""
    tests = [_fitting_one(option) for option in options(hint)]
    plain = [test for test in tests if test is not None]
    if len(plain) < len(tests):
        return None
    return plain[0] if len(plain) == 1 else _either(plain)


def _either(tests: list[Test]) -> Test:
    # Loops, here and below, and no generators: results are read by the million, and each is tested so.
    def test(value: Any) -> bool:
        for own in tests:  # noqa: SIM110
            if own(value):
                return True
        return False

    return test


def describe(hint: Any) -> str:
    """The type in words: `an integer >= 1 or null`."""
    return " or ".join(_describe_one(option) for option in options(hint))


def _bounds(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(hint) is Annotated:
        base, *marks = typing.get_args(hint)
        return base, tuple(mark for mark in marks if isinstance(mark, Ge | Gt | Le | Lt))
    return hint, ()


def _fitting_one(hint: Any) -> Test | None:
    base, bounds = _bounds(hint)
    origin = typing.get_origin(base)
    if origin is Literal:
        # The type belongs to it: True is no 1.
        allowed = {(type(own), own) for own in typing.get_args(base)}
        kinds = {kind for kind, _ in allowed}
        return lambda value: type(value) in kinds and (type(value), value) in allowed
    if origin in (list, tuple, dict):
        args = typing.get_args(base)
        tests = [fitting(item) for item in args if item is not Ellipsis]
        items = [test for test in tests if test is not None]
        if len(items) < len(tests):
            return None
        if origin is dict:
            return _mapping(*items)
        return _fixed(items) if origin is tuple and Ellipsis not in args else _repeated(*items)
    if base in (int, float):
        return _number(int if base is int else (int, float), bounds)
    return (lambda value: isinstance(value, base)) if base in (str, bool, type(None)) else None


def _mapping(key: Test, item: Test) -> Test:
    def test(value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        for name, own in value.items():  # noqa: SIM110
            if not (key(name) and item(own)):
                return False
        return True

    return test


def _repeated(item: Test) -> Test:
    return lambda value: isinstance(value, list | tuple) and all(map(item, value))


def _fixed(items: list[Test]) -> Test:
    return lambda value: (
        isinstance(value, list | tuple)
        and len(value) == len(items)
        and all(item(own) for item, own in zip(items, value, strict=True))
    )


def _number(kinds: Any, bounds: tuple[Any, ...]) -> Test:
    def test(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer beyond all floats
            return False
        if finite:
            for own in bounds:
                if not _within(value, own):
                    return False
        return finite

    return test


def _within(value: Any, bound: Any) -> bool:
    match bound:
        case Ge():
            return bool(value >= bound.ge)
        case Gt():
            return bool(value > bound.gt)
        case Le():
            return bool(value <= bound.le)
        case _:
            return bool(value < bound.lt)


def _inner_problem(value: Any, hint: Any) -> str | None:
    """The problem of the first item that does not fit, where the container itself is of the right kind."""
    for option in options(hint):
        origin, items = typing.get_origin(_bounds(option)[0]), typing.get_args(_bounds(option)[0])
        if origin is list and isinstance(value, list):
            found = ((i, problem(item, items[0])) for i, item in enumerate(value))
            return next((f"item {i}: {text}" for i, text in found if text), None)
        if origin is dict and isinstance(value, dict):
            found = ((key, problem(item, items[1])) for key, item in value.items())
            return next((f"{key}: {text}" for key, text in found if text), None)
    return None


def _describe_one(hint: Any) -> str:
    base, bounds = _bounds(hint)
    if base is type(None):
        return "null"
    if typing.get_origin(base) is Literal:
        return " | ".join(repr(value) for value in typing.get_args(base))
    items = typing.get_args(base)
    if typing.get_origin(base) is tuple and Ellipsis not in items:
        return f"a list of {len(items)}: {', '.join(describe(item) for item in items)}"
    if typing.get_origin(base) in (list, tuple):
        return f"a list of ({describe(items[0])})"
    if base not in (int, float):
        names = {str: "text", bool: "true or false"}
        return names.get(base) or str(base).replace("typing.", "")
    kind = "an integer" if base is int else "a number"
    low = next((mark for mark in bounds if isinstance(mark, Ge | Gt)), None)
    high = next((mark for mark in bounds if isinstance(mark, Le | Lt)), None)
    if low is not None and high is not None:
        left = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
        right = f"{high.le}]" if isinstance(high, Le) else f"{high.lt})"
        return f"{kind} within {left}, {right}"
    if low is not None:
        return f"{kind} {'>=' if isinstance(low, Ge) else '>'} {low.ge if isinstance(low, Ge) else low.gt}"
    if high is not None:
        return (
            f"{kind} {'<=' if isinstance(high, Le) else '<'} {high.le if isinstance(high, Le) else high.lt}"
        )
    return kind if base is int else "a finite number"
