"""Bodies of requests: JSON to records, checked for types and limits before anything is computed."""

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from fame_jax.serving.ids import ItemId, id_text
from fame_jax.serving.service.errors import Refused, invalid


class Limits(NamedTuple):
    """The limits of a request; each is reported by /metadata.

    Fields:
      body: bytes of a body.
      histories: histories of one request.
      items: items of a history; longer ones are refused.
      k: items of a list.
      waiting: histories that wait for the device; further requests get 503.
      seconds: from a request's arrival to its answer, or 504; also for its body to arrive, or 408.
    """

    body: int = 2**20
    histories: int = 256
    items: int = 1000
    k: int = 100
    waiting: int = 4096
    seconds: float = 3.0


class RecommendBody(NamedTuple):
    """The body of /recommend; `allow` None: all items, `filter_seen` None: as the export says."""

    histories: list[list[ItemId]]
    k: int = 20
    filter_seen: bool | None = None
    allow: list[ItemId] | None = None
    deny: list[ItemId] | None = None


class SimilarBody(NamedTuple):
    """The body of /similar; `by` None: the default of `Recommender.similar_items`."""

    item: ItemId
    k: int = 10
    by: str | int | None = None


def read_json(body: bytes, known: Iterable[str], needed: Iterable[str]) -> dict[str, Any]:
    """A JSON object with known members, each once.

    Raises:
      Refused: 400 if the body is not JSON, 422 if it is not such an object.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        reason = 'it is nested too deeply' if isinstance(error, RecursionError) else str(error)
        raise Refused(400, 'not_json', f'the body is not JSON: {reason[:200]}') from error
    if not isinstance(value, dict):
        raise Refused(422, 'invalid', 'the body is a JSON object')
    known = sorted(known)
    for name in value:
        if name not in known:
            raise invalid(name[:100], f'there is no such member; use {", ".join(known)}')
    for name in needed:
        if name not in value:
            raise invalid(name, 'is missing')
    return value


def read_recommend(body: bytes, limits: Limits) -> RecommendBody:
    """The body of /recommend.

    Raises:
      Refused: 400 or 422, with the field.
    """
    known = {'history', 'histories', *RecommendBody._fields}
    value = read_json(body, known, ())
    if ('history' in value) == ('histories' in value):
        raise invalid('histories', 'give either history or histories')
    if 'history' in value:
        histories = [_ids(value.pop('history'), 'history', limits.items)]
    else:
        given = value.pop('histories')
        if not isinstance(given, list) or not given:
            raise invalid('histories', 'is a list of histories, at least one')
        if len(given) > limits.histories:
            line = f'a request has at most {limits.histories:,} histories, and this has '
            raise invalid('histories', f'{line}{len(given):,}', limit=limits.histories)
        histories = [
            _ids(history, f'histories[{i}]', limits.items) for i, history in enumerate(given)
        ]
    _check_k(value, limits)
    if not isinstance(value.get('filter_seen'), bool | None):
        raise invalid('filter_seen', 'is true, false or null')
    for name in ('allow', 'deny'):
        if value.get(name) is not None:
            _ids(value[name], name, None)
    return RecommendBody(histories, **value)


def read_similar(body: bytes, limits: Limits) -> SimilarBody:
    """The body of /similar.

    Raises:
      Refused: 400 or 422, with the field.
    """
    value = read_json(body, SimilarBody._fields, ['item'])
    _ids([value['item']], 'item', 1)
    _check_k(value, limits)
    if type(value.get('by')) not in (str, int, type(None)):
        raise invalid('by', 'is a text or a number')
    return SimilarBody(**value)


def _check_k(value: dict[str, Any], limits: Limits) -> None:
    k = value.get('k', 1)
    if type(k) is not int or not 1 <= k <= limits.k:
        raise invalid('k', f'is a whole number from 1 to {limits.k}', limit=limits.k)


def _ids(value: Any, field: str, limit: int | None) -> list[ItemId]:
    """A list of ids: strings and whole numbers."""
    if not isinstance(value, list):
        raise invalid(field, 'is a list of ids')
    if limit is not None and len(value) > limit:
        line = f'a history has at most {limit:,} items, and this has {len(value):,}'
        raise invalid(field, f'{line}; send the latest', limit=limit)
    for place, item in enumerate(value):
        if type(item) is not str:
            try:
                id_text(item)
            except TypeError:
                line = f'{json.dumps(item)[:100]} is not an id: ids are strings or whole numbers'
                raise invalid(f'{field}[{place}]', line) from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError('a member stands twice in an object')
    if any(type(x) is float and not math.isfinite(x) for x in value.values()):
        raise ValueError('a number is too large')
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is not a number of JSON')
