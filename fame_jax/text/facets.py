"""Facets: each a set of labels for every item, such as its brand or its genres.

The facet INSTANCE has no labels: every item is a class of its own.
"""

import collections
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fame_jax.errors import UserError

INSTANCE = 'instance'


class Facet(NamedTuple):
    """The labels of all items on one facet.

    Fields:
      name: such as 'brand', or 'brand+genres' for two facets merged.
      labels: C names, sorted.
      label_VS: int32 [V + 1, S], each item's label indices, ascending, padded with -1; row 0, for
        padding, is all -1.
      card: counts of labels and items before and after filtering.
    """

    name: str
    labels: list[str]
    label_VS: np.ndarray
    card: dict

    def by_item(self) -> list[list[str]]:
        """The names of each item's labels, V + 1 lists."""
        return [[self.labels[n] for n in label_S if n >= 0] for label_S in self.label_VS]


def build_facet(
    name: str, named: Sequence[Sequence[str]], rarest: int = 2, commonest: float = 0.3
) -> Facet:
    """Indexes the labels of a facet and drops those that are too rare or too common.

    Names that differ only in case or blanks are one label, whose name is the most frequent
    spelling.

    Args:
      name: the facet's name.
      named: the label names of each item, V + 1 lists; entry 0 is empty.
      rarest: labels with fewer items are dropped; a label with one item gives no positives.
      commonest: labels that a larger share of the V items has are dropped; they separate little.

    Raises:
      UserError: when fewer than two labels remain.
    """
    spellings: dict[str, collections.Counter] = {}
    keys = [_count_spellings(spellings, names) for names in named]
    counts = {key: 0 for key in spellings}
    for item_keys in keys:
        for key in item_keys:
            counts[key] += 1
    most = commonest * (len(named) - 1)
    rare = {key for key, count in counts.items() if count < rarest}
    common = {key for key, count in counts.items() if count > most} - rare
    shown = {key: _most_frequent(spellings[key]) for key in counts.keys() - rare - common}
    ordered = sorted(shown, key=lambda key: (shown[key], key))
    index = {key: number for number, key in enumerate(ordered)}
    rows = [sorted(index[key] for key in item_keys if key in index) for item_keys in keys]
    labels_per_item = [len(row) for row in rows if row]
    card = {
        'name': name,
        'labels_found': len(counts),
        'labels': len(index),
        'items_found': sum(map(bool, keys)),
        'items': len(labels_per_item),
        'rare': {'labels': len(rare), 'pairs': sum(counts[key] for key in rare)},
        'common': {'labels': len(common), 'pairs': sum(counts[key] for key in common)},
        'most': max(labels_per_item, default=0),
        'median': statistics.median(labels_per_item) if labels_per_item else 0,
    }
    if len(index) < 2:
        raise UserError(_too_few_labels(card, rarest, commonest, len(named) - 1))
    return Facet(name, [shown[key] for key in ordered], _pad(rows), card)


def merge(names: Sequence[str], columns: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """Merges the labels of several facets into one list an item: 'brand: Lego', 'genres: Drama'.

    Args:
      names: the facets' names.
      columns: for each facet, each item's label names.
    """
    return [
        [f'{name}: {label}' for name, labels in zip(names, row) for label in labels]
        for row in zip(*columns)
    ]


def select(names: Sequence[str], known: Sequence[Facet]) -> tuple[Facet, ...]:
    """Selects facets by name; 'a+b' merges the labels of facets a and b.

    Raises:
      UserError: when there is no facet of that name.
    """
    by_name = {facet.name: facet for facet in known}

    def one(name: str) -> Facet:
        parts = [name] if name in by_name else name.split('+')
        unknown = [part for part in parts if part not in by_name]
        if unknown:
            raise UserError(
                f'--facets={name}: there is no facet {unknown[0]}; choose from {", ".join(by_name)}'
            )
        if len(parts) == 1:
            return by_name[name]
        named = merge(parts, [by_name[part].by_item() for part in parts])
        return build_facet(name, named, rarest=1, commonest=1.0)

    return tuple(one(name) for name in names)


def assign(facets: Sequence[str], num_heads: int) -> list[str]:
    """Assigns a facet to each head, H names.

    Where there are more facets than heads, the first ones are merged; where there are fewer, the
    last heads get INSTANCE.

    Raises:
      UserError: when INSTANCE would have to be merged.
    """
    surplus = len(facets) - num_heads
    if surplus <= 0:
        return [*facets, *[INSTANCE] * -surplus]
    merged, rest = facets[: surplus + 1], facets[surplus + 1 :]
    if INSTANCE in merged:
        raise UserError(
            f'--facets={",".join(facets)} are more than --num_heads={num_heads}, and {INSTANCE} '
            'cannot be merged with another facet; name it last, or use more heads'
        )
    return ['+'.join(merged), *rest]


def shuffle_labels(label_VS: np.ndarray, seed: int) -> np.ndarray:
    """Permutes the label sets among the items, [V + 1, S]; row 0, for padding, stays."""
    order = np.random.default_rng(seed).permutation(len(label_VS) - 1) + 1
    return np.concatenate([label_VS[:1], label_VS[order]])


def _count_spellings(spellings: dict[str, collections.Counter], names: Sequence[str]) -> set[str]:
    """Counts how each label is spelt, and returns the keys by which labels are compared."""
    keys = set()
    for name in names:
        name = ' '.join(name.split())
        if name:
            key = name.casefold()
            spellings.setdefault(key, collections.Counter())[name] += 1
            keys.add(key)
    return keys


def _most_frequent(spellings: collections.Counter) -> str:
    return min(spellings, key=lambda name: (-spellings[name], name))


def _pad(rows: list[list[int]]) -> np.ndarray:
    label_VS = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, numbers in enumerate(rows):
        label_VS[row, : len(numbers)] = numbers
    return label_VS


def _too_few_labels(card: dict, rarest: int, commonest: float, num_items: int) -> str:
    rare, common = card['rare']['labels'], card['common']['labels']
    return (
        f'facet {card["name"]!r}: {card["labels"]} of {card["labels_found"]} labels left, and two '
        f'are needed; {card["items_found"]} of {num_items} items have a label, {rare} labels have '
        f'fewer than {rarest} items, {common} labels have more than {commonest:.0%} of the items; '
        'name another facet, or change rarest_label and commonest_label in --text_options'
    )
