"""Facts about a prepared data set for its card, and the lines that `prepare` shows."""

from typing import Literal

import numpy as np

from fame_jax.data.dataset import Dataset
from fame_jax.data.split import PARTS, list_places

FOLLOWERS = 10  # of an item, the most frequent ones
BLOCK = 2**22  # actions of histories that are compared at once
MOST_ACTIONS = 1_000_000  # by which `last_item_share` is estimated
# Shares of the targets that stand in the history of their user: above the first it is said, above
# the second repeats are the rule.
REPEATS_SAID, REPEATS_RULE = 0.05, 0.5


def describe_data(data: Dataset) -> dict:
    """Returns facts for the card, of the data split by leave one out.

    Returns:
      longest: actions of the longest history.
      repeats: share of the test targets that the history holds.
      cold: share of the test targets without an action in the training part.
      last_item, earlier_item: see `last_item_share`.
    """
    items, _ = data.training_histories()
    counts = np.bincount(items, minlength=data.num_items + 1)
    targets = data.items[data.offsets[1:] - 1]
    last, earlier = last_item_share(data)
    return {
        'longest': int(data.lengths.max()),
        'repeats': repeat_share(data, 'test'),
        'cold': float(np.mean(counts[targets] == 0)),
        'last_item': last,
        'earlier_item': earlier,
    }


def repeat_share(data: Dataset, part: Literal['validation', 'test']) -> float:
    """Returns the share of the targets of a part of the split that stand in their history."""
    starts, ends = data.history_bounds(part)
    before = np.concatenate([[0], np.cumsum(ends - starts)])
    repeats, first = 0, 0
    while first < len(ends):
        # Histories of one user overlap in a split by time: a block at a time is copied.
        last = int(np.searchsorted(before, before[first] + BLOCK, side='right')) - 1
        block = slice(first, max(last, first + 1))
        targets = np.repeat(data.items[ends[block]], ends[block] - starts[block])
        found = data.items[list_places(starts[block], ends[block])] == targets
        repeats += np.count_nonzero(np.logical_or.reduceat(found, before[block] - before[first]))
        first = block.stop
    return repeats / len(ends)


def tie_share(users: np.ndarray, times: np.ndarray) -> float:
    """Returns the share of actions at the same time as another of their user.

    Args:
      users, times: [A], sorted by user, then by time.
    """
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.zeros(len(users), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return float(np.mean(tied))


def last_item_share(data: Dataset) -> tuple[float, float]:
    """Returns how often the test target is a frequent follower of the last and of an earlier item.

    A follower of an item is the next item of a history; the 10 most frequent ones of the training
    part are counted. The earlier item is the one in the middle of the history. Where the order of
    items matters, the first share is the larger one. Histories are taken evenly from all of them,
    up to a million actions.
    """
    every = -(-len(data.items) // MOST_ACTIONS)
    users = np.arange(0, data.num_users, every)
    starts, ends = data.offsets[users], data.offsets[users + 1]
    targets = data.items[ends - 1].astype(np.int64)
    queries = data.items[ends - 2], data.items[(starts + ends - 2) // 2]
    # Pairs of neighbours in the training part: all but the last two items of each history.
    lengths = ends - starts - 3
    rows = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    width = data.num_items + 1
    pairs, counts = np.unique(
        data.items[rows].astype(np.int64) * width + data.items[rows + 1], return_counts=True
    )
    order = np.lexsort((-counts, pairs // width))
    pairs = pairs[order]
    firsts = pairs // width
    frequent = np.arange(len(pairs)) - np.searchsorted(firsts, firsts) < FOLLOWERS
    frequent = np.sort(pairs[frequent])
    shares = [np.isin(query.astype(np.int64) * width + targets, frequent) for query in queries]
    return float(shares[0].mean()), float(shares[1].mean())


def describe_steps(card: dict) -> list[str]:
    """Returns the lines that say how a log was read: records, columns, order, filters, warnings.

    Args:
      card: of a prepared data set. Generated data has fewer lines.
    """
    lines, source = [], card.get('source', '')
    if 'read' in card:
        of = f'{card["lines"]:,} lines of {source}' if card.get('lines') else source
        lines.append(f'read: {card["read"]["actions"]:,} records from {of}')
    if 'columns' in card:
        guessed = card.get('guessed', ())
        chosen = [
            f'{role}={name} ({"guessed" if role in guessed else "named"})'
            for role, name in card['columns'].items()
        ]
        lines.append(f'columns: {", ".join(chosen)}; unused: {_shorten(card.get("unused", []))}')
    elif 'read' in card:
        lines.append('columns: none; each line is a user and their items, read as oldest first')
    if 'order' in card:
        lines.append(f'order: {_describe_order(card)}')
    if 'dropped' in card:
        lines.append(f'dropped: {_describe_dropped(card)}')
    lines += [f'warning: {note}' for note in card.get('notes', ())]
    if card.get('repeats', 0) > REPEATS_SAID:
        share = f'{100 * card["repeats"]:.1f} % of the test targets stand in their history already'
        lines.append(f'warning: {share}: masked figures rank them last; see the unmasked ones')
    return lines


def _shorten(names: list[str], most: int = 12) -> str:
    shown = ', '.join(map(str, names[:most])) or 'none'
    return f'{shown}, and {len(names) - most} more' if len(names) > most else shown


def _describe_order(card: dict) -> str:
    time = card.get('time')
    if not time:
        return card['order']
    about = f'by {card["columns"]["time"]}, {time["first"]} to {time["last"]} ({time["unit"]})'
    ties = f'; ties {100 * card["ties"]:.3g} %' if 'ties' in card else ''
    ties += ' (in the order of the file)' if card.get('ties') else ''
    return about + ties


def _describe_dropped(card: dict) -> str:
    before, parts = card['read'], []
    for name, counts in card['dropped'].items():
        each = [
            f'{counts[what]:,} of {before[what]:,} {what}'
            for what in ('users', 'items', 'actions')
            if counts[what]
        ]
        parts.append(f'{_label(name, card)}: {", ".join(each) or "nothing"}')
        before = {what: before[what] - counts[what] for what in before}
    if card.get('duplicates'):
        parts.append(f'duplicates: {card["duplicates"]:,} kept')
    return '; '.join(parts)


def _label(name: str, card: dict) -> str:
    labels = {'short': 'users with fewer than 3 actions', 'k_core': f'k_core={card.get("k_core")}'}
    labels['min_rating'] = f'min_rating={card.get("min_rating", 0):g}'
    labels['max_user_actions'] = f'max_user_actions={card.get("max_user_actions")}'
    return labels.get(name, name.replace('_', ' '))


def describe_split(data: Dataset) -> list[str]:
    """Returns the lines that say where a split by time is and what it counts; [] of leave one out.

    The test moment, the training part, and the targets of each part; of these, users and items that
    are not in the training part.
    """
    if not data.split.is_by_time:
        return []
    card = data.split.card
    training = card['training']
    lines = [
        f'split by time at {card["moment"]}, targets {card["targets"]}: training on '
        f'{training["actions"]:,} actions of {training["users"]:,} users with '
        f'{training["items"]:,} items before {card["validation_moment"]}'
    ]
    for part in PARTS:
        of = card[part]
        left_out = of['left_out_without_history']
        lines.append(
            f'split by time: {of["targets"]:,} {part} targets of {of["users"]:,} users; without a '
            f'training action: {of["users_without_training"]:,} users, '
            f'{of["items_without_training"]:,} items ({of["targets_without_training"]:,} targets)'
            + (f'; left out without a history: {left_out:,} targets' if left_out else '')
        )
    return lines
