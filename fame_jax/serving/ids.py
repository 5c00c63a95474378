"""Ids of items and users as text, the form in which the catalogue has them."""

import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

ItemId = str | int


def id_text(value: Any) -> str:
    """The text of an id: 7, 7.0, numpy's integers, '7' and ' 7 ' are one id, as in a log.

    Raises:
      TypeError: if the value is neither a string nor a whole number, or a float so large that it
        may have been another integer before it was rounded.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float | np.floating):
        # Integers with more bits than this were rounded on their way to a float.
        exact = 2.0 ** (np.finfo(type(value)).nmant + 1)
        if float(value).is_integer() and abs(value) < exact:
            return str(int(value))
    raise TypeError(f'{value!r} is not an id: ids are strings or whole numbers')


def id_list(ids: Iterable[ItemId]) -> list[ItemId]:
    """The ids as a list.

    Raises:
      TypeError: for a single id, whose letters would be taken for ids, or for no iterable at all.
    """
    if isinstance(ids, str | bytes | numbers.Number) or not isinstance(ids, Iterable):
        raise TypeError(f'ids come in a list, such as [{ids!r}]; got {ids!r} alone')
    return list(ids)


def some(ids: Iterable[ItemId]) -> str:
    """The first five of many ids, for a message."""
    ids = list(ids)
    return repr(ids[:5])[:-1] + (', ...]' if len(ids) > 5 else ']')
