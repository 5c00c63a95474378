"""The label sets of items: one facet's labels, which of them count, and who holds them."""

import collections
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fame_jax.errors import UserError


class Facet(NamedTuple):
    """What is known of the items on one facet.

    Fields:
      name: as it was asked for.
      labels: C names, sorted.
      label_VS: int32 [V + 1, S], each item's label numbers, ascending, then -1; row 0 is all -1.
      card: labels found, what was dropped and why, and what is left.
    """

    name: str
    labels: list[str]
    label_VS: np.ndarray
    card: dict

    def by_item(self) -> list[list[str]]:
        """Each item's labels by name; V + 1 lists."""
        return [[self.labels[n] for n in label_S if n >= 0] for label_S in self.label_VS]


def build_facet(
    name: str, named: Sequence[Sequence[str]], rarest: int = 2, commonest: float = 0.3
) -> Facet:
    """Numbers the labels of a facet and drops those that tell nothing.

    Labels that differ in case or blanks are one, shown as most often written.

    Args:
      name: the facet's.
      named: V + 1 lists of label names; entry 0 is empty.
      rarest: labels held by fewer items are dropped; they make no pair.
      commonest: labels held by a larger share of the V items are dropped; they part nothing.

    Raises:
      UserError: if fewer than two labels are left, or the limits make no sense.
    """
    _check_limits(rarest, commonest)
    spelt: dict[str, collections.Counter] = {}
    keys = [_spell(spelt, names) for names in named]
    counts = {key: 0 for key in spelt}
    for held in keys:
        for key in held:
            counts[key] += 1
    most = commonest * (len(named) - 1)
    rare = {key for key, count in counts.items() if count < rarest}
    common = {key for key, count in counts.items() if count > most} - rare
    shown = {key: _choose(spelt[key]) for key in counts.keys() - rare - common}
    ordered = sorted(shown, key=lambda key: (shown[key], key))
    numbers = {key: number for number, key in enumerate(ordered)}
    rows = [sorted(numbers[key] for key in held if key in numbers) for held in keys]
    card = {
        'name': name,
        'labels_found': len(counts),
        'labels': len(numbers),
        'items_found': sum(map(bool, keys)),
        'items': sum(map(bool, rows)),
        'rare': {'labels': len(rare), 'pairs': sum(counts[key] for key in rare)},
        'common': {'labels': len(common), 'pairs': sum(counts[key] for key in common)},
        **_summarise(rows),
    }
    if len(numbers) < 2:
        raise UserError(_complain(card, rarest, commonest, len(named) - 1))
    return Facet(name, [shown[key] for key in ordered], _pad(rows), card)


def merge(names: Sequence[str], columns: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """Several facets' label names as one's, the facet's name before each so that none collide.

    Args:
      names: of the facets.
      columns: for each facet, each item's label names.
    """
    return [
        [f'{name}: {label}' for name, labels in zip(names, row) for label in labels]
        for row in zip(*columns)
    ]


def _check_limits(rarest: int, commonest: float) -> None:
    if rarest < 1:
        raise UserError(f'the rarest label is held by {rarest} items; it must be at least 1')
    if not 0 < commonest <= 1:
        raise UserError(f"the commonest label's share is {commonest}; it must be in (0, 1]")


def _spell(spelt: dict[str, collections.Counter], names: Sequence[str]) -> set[str]:
    """Returns the keys by which names are compared, and notes how each is written."""
    held = set()
    for name in names:
        name = ' '.join(name.split())
        if name:
            key = name.casefold()
            spelt.setdefault(key, collections.Counter())[name] += 1
            held.add(key)
    return held


def _choose(written: collections.Counter) -> str:
    return min(written, key=lambda name: (-written[name], name))


def _pad(rows: list[list[int]]) -> np.ndarray:
    label_VS = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, numbers in enumerate(rows):
        label_VS[row, : len(numbers)] = numbers
    return label_VS


def _summarise(rows: list[list[int]]) -> dict:
    """Labels an item, over the items that have one."""
    many = [len(row) for row in rows if row]
    return {'most': max(many, default=0), 'median': statistics.median(many) if many else 0}


def _complain(card: dict, rarest: int, commonest: float, items: int) -> str:
    rare, common = card['rare']['labels'], card['common']['labels']
    return (
        f'facet {card["name"]!r}: {card["labels"]} of {card["labels_found"]} labels left, and two '
        f'are needed; {card["items_found"]} of {items} items have one, {rare} labels are held by '
        f'fewer than {rarest} items, {common} by more than {commonest:.0%}; '
        'name another facet, or set these limits otherwise'
    )
