"""Top-k for any history, from a trained run or from an exported folder.

Needs jax and numpy alone: no training code, no Orbax. What a folder holds is told in `export`.
"""

import collections
import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fame_jax import evaluate
from fame_jax.data import pipeline
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.sharding import DATA, MODEL, table_rows

Array = jax.Array
Rows = tuple[Array, Array, Array]

FORMAT = 1
SUMS = 'SHA256SUMS'

# Histories of a batch at the most, and scores held at a time: 64 MiB of them.
BATCH = 64
SCORES = 2**24


class Answer(NamedTuple):
    """What is recommended to one history.

    Fields:
      items: outside ids, the best first; fewer than asked for where no more may be recommended.
      scores: of the same items; counts of actions where `fallback` is 'popularity'.
      unknown: ids of the history that the catalogue does not hold; they were passed over.
      fallback: 'popularity' for a history without a known item, else ''.
    """

    items: list[str]
    scores: list[float]
    unknown: list[str]
    fallback: str


class Model(NamedTuple):
    """A trained model as serving takes it.

    Fields:
      encode: (params, tokens_BL, positions_BL, segments_BL) -> query_BQD; one function object.
      combine: score_BQV -> score_BV; one function object.
      params: what encode takes, on the device or the mesh.
      item_VD: item vectors, V + 1 of them, or as many rows as the devices of a mesh can share; row
        0 is the padding's.
      max_length: items of a history that the model sees, the latest.
      look: as encode, to what `explain` shows of FAME's heads and experts; None for another model.
      mesh: the devices that share the item vectors; None: there is one.
    """

    encode: Callable[..., Array]
    combine: Callable[[Array], Array]
    params: Any
    item_VD: Array
    max_length: int
    look: Callable[..., dict[str, Array]] | None = None
    mesh: Mesh | None = None


class Recommender:
    """A model with its catalogue."""

    def __init__(
        self,
        model: Model,
        item_ids: Sequence[str],
        count_V: np.ndarray,
        titles: Sequence[str] = (),
        card: dict[str, Any] | None = None,
    ):
        """Takes what `load_export` or a run has read.

        Args:
          model: the trained model.
          item_ids: V + 1 outside ids, the first '' for the padding.
          count_V: int [V + 1], actions by item: what is recommended to an empty history.
          titles: V + 1 titles for people, or none.
          card: what is known of model and data.
        """
        self.model = model
        self.item_ids = list(item_ids)
        self.titles = list(titles) or [''] * len(self.item_ids)
        self.card = card or {}
        self.count_V = np.asarray(count_V)
        self._popular_V = np.argsort(-self.count_V[1:], kind='stable') + 1
        self._numbers = {token: item for item, token in enumerate(self.item_ids) if item}
        self._anything = self._placed(np.arange(len(self.item_ids)) > 0)

    @property
    def num_items(self) -> int:
        """V."""
        return len(self.item_ids) - 1

    def numbers(self, tokens: Iterable[str]) -> tuple[np.ndarray, list[str]]:
        """The known items of outside ids as int32 numbers, in order, and the ids not known.

        Raises:
          TypeError: for one string, whose letters are hardly meant.
        """
        if isinstance(tokens, str):
            raise TypeError(f'ids come in a list, and not as {tokens!r}')
        tokens = list(tokens)
        found = [self._numbers.get(token, 0) for token in tokens]
        unknown = [token for token, item in zip(tokens, found) if not item]
        return np.array([item for item in found if item], np.int32), unknown

    def candidates(
        self, allow: Iterable[str] | None = None, deny: Iterable[str] = ()
    ) -> tuple[np.ndarray, list[str]]:
        """What may be recommended, bool [V + 1], and the ids of both lists that are not known.

        Args:
          allow: outside ids, and no others; None: all.
          deny: outside ids that may not.
        """
        allowed_V = np.arange(self.num_items + 1) > 0
        unknown = []
        if allow is not None:
            items, unknown = self.numbers(allow)
            allowed_V &= np.isin(np.arange(self.num_items + 1), items)
        items, more = self.numbers(deny)
        allowed_V[items] = False
        return allowed_V, [*unknown, *more]

    def recommend(self, history: Iterable[str], top_k: int = 20, **options: Any) -> Answer:
        """As `recommend_all`, for one history."""
        return next(self.recommend_all([history], top_k, **options))

    def recommend_all(
        self,
        histories: Iterable[Iterable[str]],
        top_k: int = 20,
        *,
        filter_seen: bool = True,
        allowed_V: np.ndarray | None = None,
    ) -> Iterator[Answer]:
        """Recommends to each history, in their order, holding a few thousand at a time.

        Args:
          histories: outside ids of items, the oldest first.
          top_k: how many to recommend, at least 1.
          filter_seen: whether the items of a history are left out.
          allowed_V: bool [V + 1], what may be recommended, as `candidates` has it; None: all.

        Raises:
          ValueError: if top_k is less than 1.
          FloatingPointError: when a score is NaN.
        """
        if top_k < 1:
            raise ValueError('top_k is at least 1')
        ranked = self.rank(
            (self.numbers(history) for history in histories), top_k, filter_seen, allowed_V
        )
        for item_K, score_K, unknown, fallback in ranked:
            items = [self.item_ids[item] for item in item_K.tolist()]
            yield Answer(items, score_K.tolist(), unknown, fallback)

    def rank(
        self,
        histories: Iterable[tuple[np.ndarray, list[str]]],
        top_k: int,
        filter_seen: bool,
        allowed_V: np.ndarray | None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list[str], str]]:
        """As `recommend_all`, from and to numbers of items: item_K int32 and score_K float32."""
        allowed = self._anything if allowed_V is None else self._placed(allowed_V)
        top_k = min(top_k, self.num_items)
        # The device works on a chunk while the one before is made into answers.
        pending: collections.deque = collections.deque()
        for chunk in _chunks(histories, 16 * self.batch):
            pending.append((chunk, self._dispatch(chunk, top_k, filter_seen, allowed)))
            if len(pending) > 1:
                yield from self._collect(*pending.popleft(), top_k, filter_seen, allowed)
        while pending:
            yield from self._collect(*pending.popleft(), top_k, filter_seen, allowed)

    @property
    def batch(self) -> int:
        """Histories on the device at a time; few where its part of the catalogue is large."""
        mesh = self.model.mesh
        part = table_rows(self.num_items, mesh) // (mesh.shape[MODEL] if mesh else 1)
        return max(1, min(BATCH, SCORES // part))

    def _placed(self, allowed_V: np.ndarray) -> Array:
        """On the device; on a mesh with all devices, a byte an item, before any batch asks."""
        mesh = self.model.mesh
        if mesh is None:
            return jnp.asarray(allowed_V)
        return jax.device_put(np.asarray(allowed_V), NamedSharding(mesh, PartitionSpec()))

    def _dispatch(self, chunk: list, top_k: int, filter_seen: bool, allowed_V: Array) -> list:
        """Starts the device on the histories that hold an item; [(rows' users, item, score)]."""
        model, known = self.model, [i for i, (items, _) in enumerate(chunk) if len(items)]
        if not known:
            return []
        items = np.concatenate([chunk[i][0] for i in known])
        offsets = np.cumsum([0, *(len(chunk[i][0]) for i in known)])
        # A few sizes, so that few programs are compiled.
        rows = min(self.batch, pipeline.bucket(len(known)) if len(known) > 1 else 1)
        targets = np.ones(len(known), np.int32)
        started = []
        for held in pipeline.held_rows(items, offsets, targets, model.max_length, rows):
            seen_BS = held.seen_BS if filter_seen else np.zeros((rows, 1), np.int32)
            arguments = model.params, model.item_VD, tuple(held[:3]), seen_BS, allowed_V
            found = best(model.encode, model.combine, top_k, *arguments, mesh=model.mesh)
            users = np.where(held.target_B > 0, np.array(known)[held.user_B], -1)
            started.append((users, found))
        return started

    def _collect(
        self, chunk: list, started: list, top_k: int, filter_seen: bool, allowed_V: Array
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list[str], str]]:
        """What the device found, in the order of the chunk."""
        by_user = {}
        for users, found in started:
            item_BK, score_BK = (np.asarray(x) for x in found)
            if np.isnan(score_BK[users >= 0]).any():
                raise FloatingPointError('a score is NaN; the model cannot recommend')
            kept_BK = score_BK > -np.inf
            for row in np.flatnonzero(users >= 0):
                kept_K = kept_BK[row]
                by_user[users[row]] = item_BK[row, kept_K], score_BK[row, kept_K]
        for user, (_, unknown) in enumerate(chunk):
            if user in by_user:
                yield *by_user[user], unknown, ''
            else:
                yield *self._popular(top_k, np.asarray(allowed_V)), unknown, 'popularity'

    def _popular(self, top_k: int, allowed_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        item_K = self._popular_V[allowed_V[self._popular_V]][:top_k]
        return item_K.astype(np.int32), self.count_V[item_K].astype(np.float32)


def _chunks(values: Iterable, size: int) -> Iterator[list]:
    values = iter(values)
    while chunk := list(itertools.islice(values, size)):
        yield chunk


def only_query(score_BQV: Array) -> Array:
    """The score of a model whose histories have one query, [B, V]."""
    return score_BQV[:, 0]


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames='mesh')
def best(
    encode: Callable[..., Array],
    combine: Callable[[Array], Array],
    top_k: int,
    params: Any,
    item_VD: Array,
    rows: Rows,
    seen_BS: Array,
    allowed_V: Array,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """The best items of each row and their scores, [B, K]; -inf where no more may be had.

    Of equal scores the lower number comes first. On a mesh each device finds the best of its own
    items; K of them a device and history, with their scores, are all that goes over `model`.

    Args:
      encode: as Model has it.
      combine: as Model has it.
      top_k: K, at most V + 1.
      params: what encode takes.
      item_VD: item vectors, as Model has them; on a mesh split over `model`.
      rows: tokens_BL, positions_BL, segments_BL, each row ending with its history.
      seen_BS: int32 items not to recommend, 0 for none.
      allowed_V: bool [V + 1], the items that may be recommended.
      mesh: as Model has it.
    """
    # The rows past V are nobody's item.
    allowed_V = jnp.pad(allowed_V, (0, len(item_VD) - len(allowed_V)))
    if mesh is None:
        query_BQD = encode(params, *rows)
        return _best_here(combine, top_k, query_BQD, item_VD, seen_BS, allowed_V, first=0)

    def part(query_BQD: Array, item_VD: Array, seen_BS: Array, allowed_V: Array) -> tuple:
        first, here = jax.lax.axis_index(MODEL) * len(item_VD), min(top_k, len(item_VD))
        found = _best_here(combine, here, query_BQD, item_VD, seen_BS, allowed_V, first)
        # Side by side in the order of their items, so that equal scores stay in it.
        item_BK, score_BK = (jax.lax.all_gather(x, MODEL, axis=1, tiled=True) for x in found)
        score_BK, place_BK = jax.lax.top_k(score_BK, top_k)
        return jnp.take_along_axis(item_BK, place_BK, axis=1), score_BK

    # Histories that do not divide are few: every device takes all of them.
    histories = PartitionSpec(DATA if len(seen_BS) % mesh.shape[DATA] == 0 else None)
    items = PartitionSpec(MODEL)
    rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, histories))
    divided = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(histories, items, histories, items),
        out_specs=histories,
        check_vma=False,
    )
    return divided(encode(params, *rows), item_VD, seen_BS, allowed_V)


def _best_here(
    combine: Callable[[Array], Array],
    top_k: int,
    query_BQD: Array,
    item_VD: Array,
    seen_BS: Array,
    allowed_V: Array,
    first: int | Array,
) -> tuple[Array, Array]:
    """The best of the items that a device has, those from `first` on; as `best` has them."""
    score_BV = evaluate.scores(query_BQD, item_VD, combine)
    score_BV = jnp.where(allowed_V[None], score_BV, -jnp.inf)
    row_B1, here_BS = jnp.arange(len(seen_BS))[:, None], seen_BS - first
    # A negative place would count from the end.
    here_BS = jnp.where(here_BS < 0, len(item_VD), here_BS)
    score_BV = score_BV.at[row_B1, here_BS].set(-jnp.inf, mode='drop')
    score_BK, here_BK = jax.lax.top_k(score_BV, top_k)
    return first + here_BK, score_BK


def load_export(folder: str | Path) -> Recommender:
    """Reads what `export.save` wrote; nothing is unpickled.

    Raises:
      UserError: when a file is missing, was changed or cut short, or is of another format.
    """
    folder = Path(folder)
    verify(folder)
    advice = 'export the run again'
    try:
        with explain_os_errors(f'reading {folder}', advice):
            card = json.loads((folder / 'card.json').read_text('utf-8'))
            if card['format'] != FORMAT:
                raise UserError(
                    f'{folder} is an export of format {card["format"]}, and this is fame_jax of '
                    f'format {FORMAT}; {advice}'
                )
            ids = json.loads((folder / 'ids.json').read_text('utf-8'))
            with np.load(folder / 'params.npz', allow_pickle=False) as file:
                params = [jnp.asarray(file[str(i)]) for i in range(len(file.files))]
            item_VD = jnp.asarray(np.load(folder / 'items.npy', allow_pickle=False))
            count_V = np.load(folder / 'popularity.npy', allow_pickle=False)
            model = Model(
                encode=_by_length(folder, 'encode', card['lengths']),
                combine=_read_combine(folder) if card['queries'] > 1 else only_query,
                params=params,
                item_VD=item_VD,
                max_length=card['max_length'],
                look=_by_length(folder, 'look', card['lengths']) if card['facets'] else None,
            )
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{folder} is no export of fame_jax ({error}); {advice}') from error
    return Recommender(model, ids['items'], count_V, ids['titles'], card)


def verify(folder: Path) -> None:
    """Holds each file of an export against SHA256SUMS, which `sha256sum -c` reads too.

    Raises:
      UserError: names the first file that is not as it was.
    """
    advice = 'export the run again'
    if not (folder / SUMS).is_file():
        raise UserError(f'{folder} is no export ({SUMS} is missing); make one with --stages=export')
    with explain_os_errors(f'reading {folder}', advice):
        lines = (folder / SUMS).read_text('utf-8', errors='replace').splitlines()
        sums = dict(reversed(line.split('  ', 1)) for line in lines if '  ' in line)
        for name in sorted({'card.json', 'ids.json', 'params.npz', 'items.npy', *sums}):
            path = folder / Path(name).name
            if not path.is_file():
                raise UserError(f'{path} is missing; {advice}')
            with path.open('rb') as file:
                if hashlib.file_digest(file, 'sha256').hexdigest() != sums.get(name):
                    raise UserError(f'{path} is not as it was exported (SHA-256); {advice}')


def _by_length(folder: Path, name: str, lengths: Sequence[int]) -> Callable[..., Any]:
    """The exported programs of each row length as one function."""
    programs = {length: _read_program(folder / f'{name}_{length}.stablehlo') for length in lengths}

    def call(params: Any, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> Any:
        return programs[tokens_BL.shape[1]].call(params, tokens_BL, positions_BL, segments_BL)

    return call


def _read_combine(folder: Path) -> Callable[[Array], Array]:
    return _read_program(folder / 'combine.stablehlo').call


def _read_program(path: Path) -> Any:
    from jax import export  # here, for it wants flatbuffers

    return export.deserialize(bytearray(path.read_bytes()))
