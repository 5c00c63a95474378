"""Search for items of a catalogue by words of their titles and ids."""

import re
import unicodedata
from typing import Any

from fame_jax.serving.recommender import Recommender


class Search:
    """An index of the titles and ids of a recommender's items."""

    def __init__(self, recommender: Recommender):
        self._recommender = recommender
        # By popularity, which a stable sort keeps among items of equal relevance.
        self._items = [
            (item, fold(recommender.titles[item]), fold(recommender.item_ids[item]))
            for item in recommender.by_popularity_V.tolist()
        ]

    def find(self, query: str, limit: int) -> dict[str, Any]:
        """Finds the items whose title or id holds every word of the query.

        An item whose id or title equals the query comes first, then titles that begin with it, then
        items in which each word of the query begins a word, then the rest; within each group the
        more popular item comes first.

        Args:
          query: words; '' finds all items.
          limit: most items to return.

        Returns:
          {items: [{item, title, count}], total: number of matches}.
        """
        query = fold(query)
        words = query.split()
        beginnings = [re.compile(rf'(?<!\w){re.escape(word)}') for word in words]

        def group(entry: tuple[int, str, str]) -> int:
            _, title, item_id = entry
            if query in (title, item_id):
                return 0
            if title.startswith(query):
                return 1
            return 3 - all(word.search(title) or word.search(item_id) for word in beginnings)

        matches = [
            entry for entry in self._items if all(w in entry[1] or w in entry[2] for w in words)
        ]
        if words:
            matches.sort(key=group)
        return {'items': [self._entry(item) for item, *_ in matches[:limit]], 'total': len(matches)}

    def _entry(self, item: int) -> dict[str, Any]:
        return {
            'item': self._recommender.item_ids[item],
            'title': self._recommender.titles[item],
            'count': int(self._recommender.count_V[item]),
        }


def fold(text: str) -> str:
    """A text in lower case, without accents, and with single blanks."""
    letters = unicodedata.normalize('NFKD', text.casefold())
    return ' '.join(''.join(c for c in letters if not unicodedata.combining(c)).split())
