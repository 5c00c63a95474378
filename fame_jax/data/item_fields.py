"""What the fields of an item mean: its text, and its labels on each known facet."""

import functools
import html
import re
from collections.abc import Callable

from fame_jax.data.credits import find_cast, find_directors
from fame_jax.data.facets import merge
from fame_jax.data.item_records import Records
from fame_jax.data.sources import show
from fame_jax.errors import UserError

TEXT_FIELDS = (
    *('title', 'brand', 'categories', 'keywords'),
    *('description', 'genres', 'llm_description'),
)
# What other files call these fields, the likeliest first.
ALIASES = {
    'title': 'movie_title name product_title',
    'brand': 'store brand_name',
    'categories': 'category',
    'genres': 'class genre',
    'year': 'release_year',
}
MISSING = {'', 'none', 'null', 'nan', 'n/a', '(no genres listed)'}
NO_BRAND = MISSING | {'unknown', 'generic'}  # the shops' own words for no brand
# Control characters and halves of characters, which nothing that writes text bears.
UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')


def find_field(records: Records, name: str) -> str:
    """Returns what the file calls a field, or '' if it has none such."""
    names = {field.casefold(): field for field in reversed(records.fields)}
    for guess in (name, *ALIASES.get(name, '').split()):
        if guess in records.fields:
            return guess
        if guess.casefold() in names:
            return names[guess.casefold()]
    return ''


def read_texts(records: Records, name: str) -> list[str]:
    """Returns one field of all records as text, '' where it is missing.

    Levels of a path are joined by ' > ', other lists by ', '.

    Raises:
      UserError: if there is no such field.
    """
    field = _require(records, name, f'text field {show(name)}')
    if name == 'brand':
        return [', '.join(_brand(row.get(field))) for row in records.rows]
    if name == 'categories':
        return [
            ', '.join(' > '.join(path) for path in _paths(row.get(field))) for row in records.rows
        ]
    values = _split if name == 'genres' else _values
    return [', '.join(values(row.get(field))) for row in records.rows]


def read_labels(records: Records, facet: str) -> list[list[str]]:
    """Returns the names of each record's labels on a facet: one of FACETS, or a field's values.

    Raises:
      UserError: if there is no such facet or field.
    """
    if '+' in facet and not find_field(records, facet):
        parts = [part.strip() for part in facet.split('+')]
        return merge(parts, [read_labels(records, part) for part in parts])
    if facet in FACETS:
        wanted, name_them = FACETS[facet]
        fields = [find_field(records, name) for name in wanted]
        if not any(fields):
            _require(records, wanted[0], f'facet {show(facet)}')
        return [name_them(*(row.get(field) for field in fields)) for row in records.rows]
    field = _require(records, facet, f'facet {show(facet)}')
    return [_split(row.get(field)) for row in records.rows]


def _require(records: Records, name: str, wanted: str) -> str:
    field = find_field(records, name)
    if not field:
        found = ', '.join(map(show, records.fields[:20]))
        hint = '' if not wanted.startswith('facet') else f'; known facets: {", ".join(FACETS)}'
        raise UserError(f'{records.source.place}: no field for {wanted}; found {found}{hint}')
    return field


def clean(value: object) -> str:
    """Returns a value as text: HTML entities read, blanks collapsed; '' for what says nothing."""
    if isinstance(value, str):
        return _clean(value)
    if value is None or isinstance(value, dict):
        return ''
    whole = isinstance(value, float) and value.is_integer()
    return _clean(str(int(value) if whole else value))


# Brands and levels of paths come by the thousand.
@functools.lru_cache(maxsize=2**14)
def _clean(text: str) -> str:
    if '&' in text:
        # Twice: shops' pages hold '&amp;amp;' where they mean '&'.
        text = html.unescape(html.unescape(text))
    if not text.isprintable():
        text = UNPRINTABLE.sub(' ', text)
    text = ' '.join(text.split())
    return '' if text.casefold() in MISSING else text


def _values(value: object) -> list[str]:
    """Returns a field as cleaned texts, lists within lists laid flat."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _values(part)]
    text = clean(value)
    return [text] if text else []


def _split(value: object) -> list[str]:
    """Returns a field's labels: a list's values, or what '|' parts in a string."""
    values = value if isinstance(value, list | tuple) else [value]
    return [text for part in values for text in _values(_cut(part, r'\|'))]


def _cut(value: object, separator: str) -> object:
    return re.split(separator, value) if isinstance(value, str) else value


def _paths(value: object) -> list[list[str]]:
    """Returns category paths, root first, from a list of paths, one path, or 'A > B' or 'A|B'."""
    value = _cut(value, r'\s*[|>]\s*')
    if not isinstance(value, list | tuple):
        return []
    nested = any(isinstance(part, list | tuple) for part in value)
    paths = [
        _mend(path) for path in (value if nested else [value]) if isinstance(path, list | tuple)
    ]
    return [path for path in paths if path]


def _mend(path: list) -> list[str]:
    """A level that begins with a blank was cut off its own name at a comma."""
    levels: list[str] = []
    for level in path:
        text = clean(level)
        if levels and isinstance(level, str) and level[:1] == ' ':
            levels[-1] += f', {text}'
        elif text:
            levels.append(text)
    return levels


def _level(value: object, level: int) -> list[str]:
    return [path[level] for path in _paths(value) if len(path) > level]


def _leaves(value: object) -> list[str]:
    # A path of the root alone has no leaf.
    return [path[-1] for path in _paths(value) if len(path) > 1]


def _brand(value: object, number: object = None) -> list[str]:
    names = [name for name in _split(value) if name.casefold() not in NO_BRAND]
    return names or [f'brand {text}' for text in _values(number)]


def _decade(year: object, title: object = None) -> list[str]:
    found = re.fullmatch(r'(1[89]\d\d|20\d\d)', clean(year))
    found = found or re.search(r'\((1[89]\d\d|20\d\d)\)$', clean(title))
    return [f'{found[1][:3]}0s'] if found else []


# The facets that are more than a field's values: which fields they need, and how they read them.
FACETS: dict[str, tuple[tuple[str, ...], Callable[..., list[str]]]] = {
    'brand': (('brand', 'brand_id'), _brand),
    'category2': (('categories',), lambda value: _level(value, 1)),
    'category3': (('categories',), lambda value: _level(value, 2)),
    'leaf_category': (('categories',), _leaves),
    'categories': (('categories',), lambda v: [name for path in _paths(v) for name in path[1:]]),
    'genres': (('genres',), _split),
    'decade': (('year', 'title'), _decade),
    'director': (
        ('director', 'llm_description'),
        lambda d, text: _split(d) or find_directors(clean(text)),
    ),
    'cast': (('cast', 'llm_description'), lambda c, text: _split(c) or find_cast(clean(text))),
}
