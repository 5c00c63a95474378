"""Statistics of recommended lists beyond accuracy: coverage, Gini index, novelty, popularity.

Definitions are those of RecTools where it has the metric: CatalogCoverage(normalize=True),
MeanInvUserFreq and AvgRecPopularity. Popularity is counted on training actions alone.
"""

import numpy as np

K = 10  # length of a list
POPULAR = 0.2  # share of the catalogue that is called popular
# Names of the metrics, in the order of columns.
COLUMNS = tuple(f'{name}@{K}' for name in ('coverage', 'gini', 'novelty', 'arp', 'popular'))


def list_metrics(
    item_UK: np.ndarray, items: np.ndarray, offsets: np.ndarray, num_items: int
) -> dict[str, float]:
    """The metrics of all users' lists.

    Args:
      item_UK: int [U, K], the recommended items of each user; 0 where a list is shorter.
      items: int32 [A], the items of all training actions, one user after the other.
      offsets: int64 [U + 1], the start of each user's actions, and A.
      num_items: V.

    Returns:
      coverage@10  share of the catalogue that is in at least one list
      gini@10      Gini index over all V items of the number of lists with the item: 0 if all items
                   are recommended equally often, 1 - 1 / V if only one is
      novelty@10   mean of -log2(users with an action on the item / users), in bits; an item
                   without actions counts as one with a single user
      arp@10       mean number of training actions of an item
      popular@10   share of items that are popular: `popular_items`
      The last three are means over the items of a list, then over users.

    Raises:
      ValueError: when all lists are empty.
    """
    is_item_UK = item_UK > 0
    length_U = is_item_UK.sum(axis=1)
    if not length_U.any():
        raise ValueError('no list has an item')
    item_UK, length_U = item_UK[length_U > 0], length_U[length_U > 0]
    lists_V = np.bincount(item_UK.ravel(), minlength=num_items + 1)[1:]
    count_V = np.bincount(items, minlength=num_items + 1)
    users_V = np.maximum(users_of_items(items, offsets, num_items), 1)
    novelty_V = -np.log2(users_V / np.count_nonzero(np.diff(offsets)))

    def mean(value_V: np.ndarray) -> float:
        value_V = np.where(np.arange(num_items + 1) > 0, value_V, 0)
        return float(np.mean(value_V[item_UK].sum(axis=1) / length_U))

    values = (
        np.count_nonzero(lists_V) / num_items,
        gini(lists_V),
        mean(novelty_V),
        mean(count_V),
        mean(popular_items(count_V)),
    )
    return dict(zip(COLUMNS, map(float, values)))


def show(column: str, value: float) -> str:
    """A metric as text: shares with four decimals, bits with two, actions with one."""
    decimals = {'novelty': 2, 'arp': 1}.get(column.partition('@')[0], 4)
    return f'{value:,.{decimals}f}'


def gini(count_V: np.ndarray) -> float:
    """The Gini index: mean difference of two items' counts, divided by twice their mean.

    Args:
      count_V: counts of V items, without the padding; not all 0.
    """
    sorted_V, items = np.sort(count_V), len(count_V)
    weight_V = 2 * np.arange(1, items + 1) - items - 1
    return float(weight_V @ sorted_V / (items * sorted_V.sum()))


def popular_items(count_V: np.ndarray) -> np.ndarray:
    """The fifth of the catalogue with the most actions, and items that tie with its last one.

    Args:
      count_V: int [V + 1], actions of each item; entry 0 is the padding's.

    Returns:
      bool [V + 1]; items without actions and the padding are not popular.
    """
    place = int(np.ceil(POPULAR * (len(count_V) - 1))) - 1
    least = np.sort(count_V[1:])[::-1][place]
    is_popular_V = count_V >= max(least, 1)
    is_popular_V[0] = False
    return is_popular_V


def users_of_items(items: np.ndarray, offsets: np.ndarray, num_items: int) -> np.ndarray:
    """The number of users with at least one action on each item, int64 [V + 1]."""
    user_A = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    pair_P = np.unique(user_A * (num_items + 1) + items)
    return np.bincount(pair_P % (num_items + 1), minlength=num_items + 1)
