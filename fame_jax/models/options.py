"""Options of a model: the fields of its class, their types and ranges, and their parsing.

An option is annotated as int, float, bool or Literal[...]. `Annotated[int, Range(1, 64)]` adds a
range; the names below are the usual ones. A model's options are thus stated once, on its class.
"""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple


class Range(NamedTuple):
    """Values from `low` to `high`, both allowed."""

    low: float
    high: float


class Traced(NamedTuple):
    """Marks a number that may be an argument of a program, which runs with other values then share.

    A value that switches a term off may not; see `objective.is_equal`.
    """


Width = Annotated[int, Range(1, 65_536)]
Count = Annotated[int, Range(1, 1_000_000)]
Heads = Annotated[int, Range(1, 1024)]
Length = Annotated[int, Range(1, 100_000)]
Rate = Annotated[float, Range(0, 0.99), Traced()]  # of dropout
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, 1000), Traced()]  # of a term of the loss; 0 switches it off
Temperature = Annotated[float, Range(1e-4, 1000), Traced()]

# Fields that are no options: the data, the numeric type and the devices decide them.
NOT_OPTIONS = ('num_items', 'dtype', 'mesh', 'text_width', 'parent', 'name')


class Option(NamedTuple):
    """An option of a model class."""

    default: Any
    kind: type  # int, float, bool or str
    choices: tuple[Any, ...]  # empty: any value of the kind
    range: Range | None
    is_traced: bool = False  # whether it is marked `Traced`


@functools.cache
def of(cls: type) -> Mapping[str, Option]:
    """The options of a model class by name, in the order of its fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: _option(cls, field.name, hints[field.name], field.default)
        for field in dataclasses.fields(cls)
        if field.name not in NOT_OPTIONS
    }


def _option(cls: type, name: str, hint: Any, default: Any) -> Option:
    bounds, extras = None, []
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Range)), None)
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else hint
    if kind not in (int, float, bool, str):
        raise TypeError(f'{cls.__name__}.{name} is annotated {hint}; use int, float, bool, Literal')
    if default is dataclasses.MISSING:
        raise TypeError(f'{cls.__name__}.{name} has no default; every option of a model needs one')
    return Option(default, kind, choices, bounds, Traced() in extras)


def parse(cls: type, name: str, value: Any) -> Any:
    """The value of an option, read from text if it is given as text.

    Raises:
      ValueError: the class has no such option, or the value is not of its type, choices or range.
    """
    known = of(cls)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean {close[0]}? ' if close else ''
        raise ValueError(
            f'{name}={value}: {cls.title} has no option {name}; {hint}its options are '
            f'{", ".join(known)}'
        )
    option = known[name]
    if isinstance(value, str) and option.kind is not str:
        value = _from_text(name, value, option.kind)
    if option.kind is float and type(value) is int:
        value = float(value)
    _check(name, value, option)
    return value


def check(module: Any) -> None:
    """Checks the type, the choices and the range of every option of a module.

    Raises:
      ValueError: names the option and what it may be.
    """
    for name, option in of(type(module)).items():
        _check(name, getattr(module, name), option)


def _from_text(name: str, text: str, kind: type) -> Any:
    words = {'true': True, '1': True, 'false': False, '0': False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: 'true or false', int: 'a whole number', float: 'a number'}[kind]
        raise ValueError(f'{name}={text} has to be {wanted}') from None


def _check(name: str, value: Any, option: Option) -> None:
    if option.choices:
        if value not in option.choices:
            close = difflib.get_close_matches(str(value), map(str, option.choices), n=1)
            choices = ', '.join(map(str, option.choices))
            hint = f'did you mean {close[0]}?' if close else f'choose from {choices}'
            raise ValueError(f'{name}={value}: {hint}')
        return
    kinds = (int, float) if option.kind is float else (option.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and option.kind is not bool):
        raise ValueError(f'{name}={value!r} has to be of type {option.kind.__name__}')
    if option.range and not option.range.low <= value <= option.range.high:
        low, high = option.range
        raise ValueError(f'{name}={value} is out of range; it must be from {low} to {high}')
