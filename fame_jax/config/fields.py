"""How a field of a record describes its flag, and the checks that need only that description."""

import csv
import dataclasses
import difflib
import io
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fame_jax.errors import UserError

TYPES = {
    **{bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a text'},
    tuple: 'a tuple of texts',
}


def field(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field that is a flag too.

    Args:
      default: its value where none is given. None means that the model decides.
      help: one or two sentences for --help.
      about: `kind`, the type, where the default is None; `choices`; `low` and `high`, inclusive;
        `separator` for a flag of pairs, and `names` of those pairs; `binds`, the section whose work
        fixes the value in a workdir: by default the field's own, '' for a value that may change
        from command to command; `pair_binds`, the same for single pairs by name.
    """
    about.setdefault('kind', type(default))
    return dataclasses.field(default=default, metadata={'help': help, **about})


def check_fields(record: Any) -> None:
    """Checks type, range and choices of each field of a record.

    Raises:
      UserError: naming the flag, its value and what is allowed.
    """
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if value is not None or item.default is not None:
            check_value(item.name, value, item.metadata)


def check_value(name: str, value: Any, about: Mapping[str, Any]) -> None:
    """Checks one value of a flag against what its field says; see `field`."""
    kind, choices = about['kind'], about.get('choices')
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'--{name}={value!r}: give {TYPES[kind]}')
    for one in value if kind is tuple else (value,):
        # A flag file has one flag on a line, in UTF-8, without blanks around it.
        if isinstance(one, str) and one != ' '.join(
            one.encode(errors='ignore').decode().strip().splitlines()
        ):
            raise UserError(f'--{name}={one!r} cannot stand on a line of a flag file; rename it')
        if choices and one not in choices:
            hint = suggest(str(one), choices)
            raise UserError(f'--{name}={one}: there is no such value; {hint}')
    low, high = about.get('low'), about.get('high')
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        most = f' and at most {high}' if high is not None else ''
        raise UserError(f'--{name}={value} is out of range; it must be at least {low}{most}')
    if 'separator' in about:
        parse_pairs(name, value, about)


def parse_pairs(name: str, pairs: Iterable[str], about: Mapping[str, Any]) -> dict[str, str]:
    """The pairs of a flag such as --synthetic=users=4000,items=1000 as a dict of texts.

    Raises:
      UserError: for a text that is no pair, an unknown name or a name given twice.
    """
    separator, names = about['separator'], about.get('names')
    values: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition(separator)
        if not (key and value):
            raise UserError(f'--{name}={pair}: write NAME{separator}VALUE, with commas between')
        if names is not None and key not in names:
            raise UserError(f'--{name}={pair}: there is no name {key!r}; {suggest(key, names)}')
        if key in values:
            raise UserError(f'--{name}: {key!r} is given twice')
        values[key] = value
    return values


def pairs_of(record: Any, name: str) -> dict[str, str]:
    """The pairs of a record's field as a dict; see `parse_pairs`."""
    about = type(record).__dataclass_fields__[name].metadata
    return parse_pairs(name, getattr(record, name), about)


def merge_pairs(separator: str, *layers: Iterable[str]) -> tuple[str, ...]:
    """The pairs of all layers, by name; of one name the last layer's value."""
    merged = dict(pair.split(separator, 1) for layer in layers for pair in layer)
    spell = canonical if separator == '=' else str
    return tuple(f'{key}{separator}{spell(value)}' for key, value in merged.items())


def canonical(value: Any) -> str:
    """One spelling for equal values: 1e-3 and .001 are '0.001', 4.0 is '4', True is 'true'."""
    text = str(value)
    if text.lower() in ('true', 'false'):
        return text.lower()
    try:
        number = float(text)
    except ValueError:
        return text
    whole = number.is_integer() and abs(number) < 2**53  # false for nan and inf
    return str(int(number)) if whole else repr(number)


def show(value: Any) -> str:
    """A value as it stands behind --NAME= on the command line and in a flag file."""
    if not isinstance(value, tuple):
        return str(value).lower() if isinstance(value, bool) else str(value)
    line = io.StringIO()
    csv.writer(line, lineterminator='').writerow(value)
    return line.getvalue()


def no_effect(flag: str, setting: str, advice: str) -> UserError:
    """The error for a flag that does nothing where another has its value."""
    return UserError(f'--{flag} has no effect where --{setting}; {advice}, or leave it out')


def suggest(name: str, names: Collection[str]) -> str:
    """Ends an error about an unknown name: the closest name, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f'did you mean {close[0]}?' if close else f'choose from {", ".join(names)}'
