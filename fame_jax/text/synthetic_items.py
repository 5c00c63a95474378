"""Texts of the items of synthetic data, whose words depend on the items' facets."""

import numpy as np

from fame_jax.text.facets import build_facet
from fame_jax.text.items import ItemText

OWN_WORDS, KEPT = 4, 0.6  # words that belong to a value, and the probability that each is written
NOISE_WORDS, NOISE = 200, 6  # words without a meaning, and the number of them in a text


def describe_items(item_facets: np.ndarray, seed: int = 0) -> ItemText:
    """Writes texts of the items of synthetic data, whose words depend on the items' facets.

    Each value of each facet has four made-up words of its own. A text holds each word of its
    item's values with probability 0.6, and six words of noise; some texts have no word of a value.

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
