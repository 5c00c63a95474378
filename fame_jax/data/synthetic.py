"""A world with planted facets: it needs no file, and what a model should find in it is known."""

import numpy as np

from fame_jax.data.facets import build_facet
from fame_jax.data.item_text import ItemText
from fame_jax.data.sequences import Sequences, seal
from fame_jax.errors import UserError

SHORTEST, LONGEST, MEAN = 5, 40, 10.0  # actions of a user
PREFERRED = (0.4, 0.35, 0.25)  # chance of having 1, 2, 3 preferred values
OWN_WORDS, KEPT = 4, 0.6  # words that belong to a value, and the chance of each to be written
NOISE_WORDS, NOISE = 200, 6  # words that mean nothing, and how many of them a text holds
ROUNDS = (6, 4, 1000)  # tries for another item: of the same value, of a preferred one, of any


def generate(
    users: int = 4000,
    items: int = 1000,
    facets: int = 2,
    values: int = 8,
    seed: int = 0,
    faithful: float = 0.9,
    sticky: float = 0.75,
    zipf: float = 0.7,
) -> Sequences:
    """Draws a world in which each user follows one facet and likes a few of its values.

    Every item has a value on each of M facets. A user follows one facet and has 1 to 3 preferred
    values there; an action is an item of the current value with probability `faithful`, else any
    item. The current value stays for the next action with probability `sticky`, else it is drawn
    anew among the preferred. Nobody does an item twice; histories have 5 to 40 actions, 10 on
    average. Items that nobody drew are left out, so item_facets has V <= items rows after row 0.

    Args:
      users, items: U and the number of items to draw from.
      facets, values: M, and the number of values of each facet.
      seed: the world's; equal arguments give equal worlds.
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
            raise UserError(f'synthetic data: {name} is {number}; it must be at least {least}')
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


def describe_items(item_facets: np.ndarray, seed: int = 0) -> ItemText:
    """Writes about the items of a world, so that their facets can be found in the texts.

    Each value of each facet has four made-up words of its own. A text holds each word of its
    item's values with probability 0.6, and six words that mean nothing: now and then there is no
    word of a value at all.

    Args:
      item_facets: int32 [V + 1, M], values from 0, -1 where there is none.
      seed: of the words; equal arguments give equal texts.

    Returns:
      Texts, titles, and a facet with its labels for each planted one: facet_1, ..., facet_M.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    facets, values = item_facets.shape[1], int(item_facets.max()) + 1
    words = _make_words(rng, facets * values * OWN_WORDS + NOISE_WORDS)
    own = words[NOISE_WORDS:].reshape(facets, values, OWN_WORDS)
    texts, titles = [''], ['']
    for item, row in enumerate(item_facets[1:], start=1):
        spoken = [own[facet, value] for facet, value in enumerate(row) if value >= 0]
        kept = [word for word in np.ravel(spoken) if rng.random() < KEPT]
        kept += list(rng.choice(words[:NOISE_WORDS], NOISE))
        texts.append(' '.join(rng.permutation(kept)))
        titles.append(f'item-{item} ({", ".join(map(str, row))})')
    digits = len(str(values - 1))
    built = tuple(
        build_facet(
            f'facet_{facet + 1}',
            [[f'value {v:0{digits}}'] if v >= 0 else [] for v in item_facets[:, facet]],
            rarest=1,
            commonest=1.0,
        )
        for facet in range(facets)
    )
    card = {'source': 'synthetic', 'seed': seed, 'facets': [facet.card for facet in built]}
    return ItemText(texts, titles, built, card)


def _make_words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns distinct words of four syllables, str [count]."""
    syllables = [f'{one}{two}' for one in 'bdfgklmnprstvz' for two in 'aeiou']
    numbers = rng.choice(len(syllables) ** 4, count, replace=False)
    digits = numbers[:, None] // len(syllables) ** np.arange(4) % len(syllables)
    return np.array([''.join(syllables[digit] for digit in row) for row in digits])


def _draw_lengths(rng: np.random.Generator, users: int, longest: int) -> np.ndarray:
    """Geometric above the shortest: many short histories, few long ones, int64 [U]."""
    # The mean is that before the cut at the longest, which takes about a hundredth off.
    return np.minimum(SHORTEST - 1 + rng.geometric(1 / (MEAN - SHORTEST + 1), users), longest)


def _draw_values(
    rng: np.random.Generator, lengths: np.ndarray, values: int, sticky: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each user's preferred values, int64 [U, 3], and the one of each action, int64 [A]."""
    users = len(lengths)
    liked = rng.random((users, values)).argsort(axis=1)[:, : len(PREFERRED)]
    many = np.minimum(rng.choice(len(PREFERRED), users, p=PREFERRED) + 1, liked.shape[1])
    # A user with fewer than three repeats them, so that any column is a preferred value.
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
    """Returns the item of each action, int64 [A] from 0, none twice for one user."""
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
    raise RuntimeError('no items without repetition')  # a history is at most half the items


class _Pools:
    """Items by facet and value, to draw many at once by popularity."""

    def __init__(self, item_facets: np.ndarray, values: int, popularity: np.ndarray) -> None:
        items, facets = item_facets.shape
        self.values = values
        # One row an item and facet, sorted by (facet, value); the last pool holds every item.
        pool = (item_facets + self.values * np.arange(facets)).T.ravel()
        pool = np.concatenate([pool, np.full(items, self.values * facets)])
        order = np.argsort(pool, kind='stable')
        self.items = np.tile(np.arange(items), facets + 1)[order]
        self.sums = np.concatenate([[0.0], np.cumsum(np.tile(popularity, facets + 1)[order])])
        self.edges = np.searchsorted(pool[order], np.arange(self.values * facets + 2))

    def draw(self, rng: np.random.Generator, facet: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Returns an item of each (facet, value), int64; any item where the value is -1."""
        # With fewer items than values some values have no item.
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
) -> Sequences:
    present, numbers = np.unique(drawn, return_inverse=True)
    facets = np.concatenate([np.full((1, item_facets.shape[1]), -1), item_facets[present]])
    return seal(
        Sequences(
            items=(numbers + 1).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            user_ids=[f'user-{n}' for n in range(1, len(lengths) + 1)],
            item_ids=['', *(f'item-{n}' for n in range(1, len(present) + 1))],
            card={'name': 'synthetic', 'source': 'synthetic', 'world': parameters},
            item_facets=facets.astype(np.int32),
            user_facets=followed.astype(np.int32),
        )
    )
