"""Generated data with known facets, for runs that need no file."""

import numpy as np

from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError

OPTIONS = ('users', 'items', 'facets', 'values', 'seed')  # arguments of `generate` for a run
SHORTEST, LONGEST, MEAN = 5, 40, 10.0  # actions of a user
PREFERRED = (0.4, 0.35, 0.25)  # probability of 1, 2, 3 preferred values
ROUNDS = (6, 4, 1000)  # redraws of a repeated item: same value, a preferred value, any value


def generate(
    users: int = 4000,
    items: int = 1000,
    facets: int = 2,
    values: int = 8,
    seed: int = 0,
    faithful: float = 0.9,
    sticky: float = 0.75,
    zipf: float = 0.7,
) -> Dataset:
    """Generates a data set in which each user follows one facet and prefers a few of its values.

    Every item has a value on each of M facets. A user follows one facet and has 1 to 3 preferred
    values on it. With probability `faithful`, an action is an item of the user's current value,
    otherwise any item. With probability `sticky`, the current value stays for the next action,
    otherwise it is drawn again from the preferred ones. No user has an item twice; histories have 5
    to 40 actions, 10 on average. Items that were never drawn are left out, so V <= `items`.

    Args:
      users: U.
      items: the number of items to draw from.
      facets: M.
      values: the number of values of each facet.
      seed: equal arguments give equal data.
      faithful, sticky: probabilities, see above.
      zipf: exponent of the items' popularity.

    Raises:
      UserError: if there are too few users, items, facets or values.
    """
    for name, number, least in (
        ('users', users, 1),
        ('items', items, 2 * SHORTEST),
        ('facets', facets, 1),
        ('values', values, 1),
    ):
        if number < least:
            raise UserError(f'synthetic data: {name}={number}; choose {least} or more')
    rng = np.random.Generator(np.random.PCG64(seed))
    item_facets = np.stack([rng.permutation(items) % values for _ in range(facets)], axis=1)
    popularity = rng.permutation(np.arange(1, items + 1) ** -zipf)
    followed = rng.integers(facets, size=users)
    lengths = _draw_lengths(rng, users, min(LONGEST, items // 2))
    owners = np.repeat(np.arange(users), lengths)
    liked, current = _draw_values(rng, lengths, values, sticky)
    current = np.where(rng.random(len(owners)) < faithful, current, -1)
    drawn = _draw_items(rng, item_facets, values, popularity, followed, owners, liked, current)
    parameters = {
        'users': users, 'items': items, 'facets': facets, 'values': values, 'seed': seed,
        'faithful': faithful, 'sticky': sticky, 'zipf': zipf,
    }  # fmt: skip
    return _assemble(drawn, lengths, item_facets, followed, parameters)


def _draw_lengths(rng: np.random.Generator, users: int, longest: int) -> np.ndarray:
    """Returns geometric lengths from the shortest on: many short ones, few long ones, int64 [U]."""
    # MEAN is before the cut at the longest, which lowers it by about 1 %.
    return np.minimum(SHORTEST - 1 + rng.geometric(1 / (MEAN - SHORTEST + 1), users), longest)


def _draw_values(
    rng: np.random.Generator, lengths: np.ndarray, values: int, sticky: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the preferred values of users, int64 [U, 3], and the value of actions, int64 [A]."""
    users = len(lengths)
    liked = rng.random((users, values)).argsort(axis=1)[:, : len(PREFERRED)]
    many = np.minimum(rng.choice(len(PREFERRED), users, p=PREFERRED) + 1, liked.shape[1])
    # Users with fewer than three repeat theirs, so that every column is a preferred value.
    liked = liked[np.arange(users)[:, None], np.arange(len(PREFERRED)) % many[:, None]]
    steps = lengths.max()
    fresh = rng.random((users, steps)) >= sticky
    choice = rng.integers(many[:, None], size=(users, steps))
    fresh[:, 0] = True
    since = np.maximum.accumulate(np.where(fresh, np.arange(steps), 0), axis=1)
    chosen = np.take_along_axis(choice, since, axis=1)
    return liked, np.take_along_axis(liked, chosen, axis=1)[np.arange(steps) < lengths[:, None]]


def _draw_items(
    rng: np.random.Generator,
    item_facets: np.ndarray,
    values: int,
    popularity: np.ndarray,
    followed: np.ndarray,
    owners: np.ndarray,
    liked: np.ndarray,
    current: np.ndarray,
) -> np.ndarray:
    """Returns the item of each action, int64 [A] from 0; no user has an item twice."""
    pools = _Pools(item_facets, values, popularity)
    drawn = np.zeros(len(owners), np.int64)
    todo = np.arange(len(owners))
    for tries in range(sum(ROUNDS)):
        value = current[todo]
        if tries >= ROUNDS[0]:
            preferred = liked[owners[todo], rng.integers(len(PREFERRED), size=len(todo))]
            value = np.where(value < 0, value, preferred)
        if tries >= ROUNDS[0] + ROUNDS[1]:
            value = np.full(len(todo), -1)
        drawn[todo] = pools.draw(rng, followed[owners[todo]], value)
        _, first = np.unique(owners * len(item_facets) + drawn, return_index=True)
        repeated = np.ones(len(owners), bool)
        repeated[first] = False
        todo = np.flatnonzero(repeated)
        if not len(todo):
            return drawn
    raise RuntimeError('an item occurs twice')  # impossible: a history is at most half the items


class _Pools:
    """The items of each facet and value, to draw from by popularity, many at once."""

    def __init__(self, item_facets: np.ndarray, values: int, popularity: np.ndarray) -> None:
        items, facets = item_facets.shape
        self.values = values
        # One entry per item and facet, sorted by (facet, value). The last pool has all items.
        pool = (item_facets + self.values * np.arange(facets)).T.ravel()
        pool = np.concatenate([pool, np.full(items, self.values * facets)])
        order = np.argsort(pool, kind='stable')
        self.items = np.tile(np.arange(items), facets + 1)[order]
        self.sums = np.concatenate([[0.0], np.cumsum(np.tile(popularity, facets + 1)[order])])
        self.edges = np.searchsorted(pool[order], np.arange(self.values * facets + 2))

    def draw(self, rng: np.random.Generator, facet: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Returns an item of each (facet, value), int64; any item where the value is -1."""
        # With fewer items than values, some values have no item.
        everything = len(self.edges) - 2
        pool = np.where(value < 0, everything, facet * self.values + value)
        pool = np.where(self.edges[pool] == self.edges[pool + 1], everything, pool)
        low, high = self.edges[pool], self.edges[pool + 1]
        at = self.sums[low] + rng.random(len(pool)) * (self.sums[high] - self.sums[low])
        return self.items[np.clip(np.searchsorted(self.sums, at, side='right') - 1, low, high - 1)]


def _assemble(
    drawn: np.ndarray,
    lengths: np.ndarray,
    item_facets: np.ndarray,
    followed: np.ndarray,
    parameters: dict,
) -> Dataset:
    present, numbers = np.unique(drawn, return_inverse=True)
    facets = np.concatenate([np.full((1, item_facets.shape[1]), -1), item_facets[present]])
    kinds = {'user': 'str', 'item': 'str'}
    card = {'name': 'synthetic', 'source': 'synthetic', 'world': parameters, 'id_kinds': kinds}
    return Dataset(
        items=(numbers + 1).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        user_ids=[f'user-{n}' for n in range(1, len(lengths) + 1)],
        item_ids=['', *(f'item-{n}' for n in range(1, len(present) + 1))],
        card=card,
        item_facets=facets.astype(np.int32),
        user_facets=followed.astype(np.int32),
    ).with_counts()
