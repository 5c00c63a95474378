"""The meaning of an item file's fields: the text of an item, and its labels on each facet."""

import functools
import html
import re
from collections.abc import Callable

from fame_jax.data.sources import show
from fame_jax.errors import UserError
from fame_jax.text.facets import merge
from fame_jax.text.item_files import Records, fields_named

TEXT_FIELDS = (
    *('title', 'brand', 'categories', 'keywords'),
    *('description', 'genres', 'llm_description'),
)
# Other names of these fields in known files, the most likely first.
ALIASES = {
    'title': 'movie_title name product_title',
    'brand': 'store brand_name',
    'categories': 'category',
    'genres': 'class genre',
    'year': 'release_year',
}
MISSING = {'', 'none', 'null', 'nan', 'n/a', '(no genres listed)'}
NO_BRAND = MISSING | {'unknown', 'generic'}  # words that shops write for no brand
# Control characters and lone surrogates, which cannot be written as UTF-8 or on a screen.
UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')


def find_field(records: Records, name: str) -> str:
    """Returns the name of a field in the file, or '' if the file does not have it."""
    names = {field.casefold(): field for field in reversed(records.fields)}
    for guess in (name, *ALIASES.get(name, '').split()):
        if guess in records.fields:
            return guess
        if guess.casefold() in names:
            return names[guess.casefold()]
    return ''


def read_texts(records: Records, name: str) -> list[str]:
    """Returns one field of all records as text; '' where it is missing.

    The levels of a path are joined by ' > ', other lists by ', '.

    Raises:
      UserError: when the file does not have the field.
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

    'a+b' merges the labels of facets a and b.

    Raises:
      UserError: when there is no such facet and the file has no such field.
    """
    if '+' in facet and not find_field(records, facet):
        parts = [part.strip() for part in facet.split('+')]
        return merge(parts, [read_labels(records, part) for part in parts])
    if facet in FACETS:
        wanted, name_them = FACETS[facet]
        fields = [find_field(records, name) for name in wanted]
        if not any(fields):
            fields[0] = _require(records, wanted[0], f'facet {show(facet)}')
        return [name_them(*(row.get(field) for field in fields)) for row in records.rows]
    field = _require(records, facet, f'facet {show(facet)}')
    return [_split(row.get(field)) for row in records.rows]


def _require(records: Records, name: str, wanted: str) -> str:
    field = find_field(records, name)
    alike = [] if field else fields_named(records, name)
    if len(alike) == 1:
        return alike[0]
    if not field:
        present = ', '.join(map(show, records.fields[:20]))
        hint = f'; the facets are {", ".join(FACETS)}' if wanted.startswith('facet') else ''
        raise UserError(
            f'{records.source.place}: there is no field for {wanted}; its fields are {present}'
            f'{hint}'
        )
    return field


def clean(value: object) -> str:
    """Returns a value as text: HTML entities decoded, blanks collapsed; '' where it is missing."""
    if isinstance(value, str):
        return _clean(value)
    if value is None or isinstance(value, dict):
        return ''
    whole = isinstance(value, float) and value.is_integer()
    return _clean(str(int(value) if whole else value))


# Brands and levels of paths occur thousands of times.
@functools.lru_cache(maxsize=2**14)
def _clean(text: str) -> str:
    if '&' in text:
        # Twice, since shops' pages have '&amp;amp;' for '&'.
        text = html.unescape(html.unescape(text))
    if not text.isprintable():
        text = UNPRINTABLE.sub(' ', text)
    text = ' '.join(text.split())
    return '' if text.casefold() in MISSING else text


def _values(value: object) -> list[str]:
    """Returns a field as cleaned texts, nested lists flattened."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _values(part)]
    text = clean(value)
    return [text] if text else []


def _split(value: object) -> list[str]:
    """Returns a field's labels: the values of a list, or the parts of a string between '|'."""
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
    paths = [path for path in (value if nested else [value]) if isinstance(path, list | tuple)]
    return [path for path in map(_clean_path, paths) if path]


def _clean_path(path: list) -> list[str]:
    """Cleans a path; a level that begins with a blank is the rest of a name cut at a comma."""
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
    match = re.fullmatch(r'(1[89]\d\d|20\d\d)', clean(year))
    match = match or re.search(r'\((1[89]\d\d|20\d\d)\)$', clean(title))
    return [f'{match[1][:3]}0s'] if match else []


# Facets that are more than the values of one field: the fields they need, and the function that
# makes labels of these fields' values.
FACETS: dict[str, tuple[tuple[str, ...], Callable[..., list[str]]]] = {
    'brand': (('brand', 'brand_id'), _brand),
    'category2': (('categories',), lambda value: _level(value, 1)),
    'category3': (('categories',), lambda value: _level(value, 2)),
    'leaf_category': (('categories',), _leaves),
    'categories': (('categories',), lambda v: [name for path in _paths(v) for name in path[1:]]),
    'genres': (('genres',), _split),
    'decade': (('year', 'title'), _decade),
    'director': (('director',), _split),
    'cast': (('cast',), _split),
}
