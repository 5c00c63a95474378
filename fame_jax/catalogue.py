"""Items of a recommender found by words."""

import re
import unicodedata
from typing import Any

from fame_jax.serve import Recommender


class Catalogue:
    """Items found by words of their titles and ids."""

    def __init__(self, recommender: Recommender):
        self._of = recommender
        self._count = recommender.count_V.tolist()
        # The most popular first, so that a stable sort keeps them so.
        self._texts = [
            (item, fold(recommender.titles[item]), fold(recommender.item_ids[item]))
            for item in sorted(range(1, len(self._count)), key=lambda item: -self._count[item])
        ]

    def find(self, query: str, limit: int) -> dict[str, Any]:
        """The items that hold every word, {items: [{item, title, count}], total}.

        First the item whose id or title the query is, then titles that begin with it, then items
        of which each word begins a word, then the rest; among equals the more popular one first.
        """
        asked = fold(query)
        words = dict.fromkeys(asked.split())
        begins = [re.compile(rf'(?<!\w){re.escape(word)}') for word in words]

        def place(match: tuple[int, str, str]) -> int:
            _, title, token = match
            if asked in (title, token):
                return 0
            if title.startswith(asked):
                return 1
            return 3 - all(word.search(title) or word.search(token) for word in begins)

        matches = [
            (item, title, token)
            for item, title, token in self._texts
            if all(word in title or word in token for word in words)
        ]
        if words:
            matches.sort(key=place)
        items = [self._told(item) for item, _, _ in matches[:limit]]
        return {'items': items, 'total': len(matches)}

    def _told(self, item: int) -> dict[str, Any]:
        names = {'item': self._of.item_ids[item], 'title': self._of.titles[item]}
        return names | {'count': self._count[item]}


def fold(text: str) -> str:
    """A text without the differences that a search passes over: case, accents, runs of blanks."""
    letters = unicodedata.normalize('NFKD', text.casefold())
    return ' '.join(''.join(c for c in letters if not unicodedata.combining(c)).split())
