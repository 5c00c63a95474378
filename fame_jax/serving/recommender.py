"""Recommender: a trained model with its catalogue, from a run or from an exported folder."""

import copy
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fame_jax.data import eval_batches
from fame_jax.parallel.mesh import MODEL, table_rows
from fame_jax.serving import rows, topk
from fame_jax.serving.ids import ItemId, id_list, id_text, some

if TYPE_CHECKING:
    from fame_jax.serving.explain import Explanation

Array = jax.Array

# Most histories in a batch, and most scores of a batch: 64 MiB of float32.
MAX_BATCH = 64
MAX_SCORES = 2**24
# Batches that are dispatched to the device before their results are read, and the most items of
# their histories.
BATCHES_AHEAD, ITEMS_AHEAD = 16, 2**20
# Rows of a batch of a few histories. One of MAX_BATCH takes several times as long on a CPU, and is
# used only where it is nearly full.
FEW_ROWS, NEARLY_FULL = 8, 0.8

# Kinds of scores, which are not comparable: of a model whose queries and items are compared by
# their inner product, or by their cosine divided by a temperature; of `similar_items`; and of the
# most popular items.
DOT, SCALED_COSINE = 'dot product', 'cosine / temperature'
COSINE, POPULARITY = 'cosine', 'number of actions'


class Recommendation(NamedTuple):
    """A list of items for one history.

    Fields:
      items: item ids, best first; fewer than k where no more items are allowed.
      scores: the scores of these items; numbers of actions if `fallback` is 'popularity'.
      unknown: ids of the history that are not in the catalogue, as given; they were skipped.
      fallback: 'popularity' if no id of the history is known, else ''.
      score_kind: the scale of the scores: 'dot product', 'cosine / temperature', 'cosine' or
        'number of actions'. Scores of two scales are not comparable.
      titles: the titles of these items, '' where unknown; empty if no title is known.
    """

    items: list[ItemId]
    scores: list[float]
    unknown: list[ItemId]
    fallback: str
    score_kind: str = DOT
    titles: Sequence[str] = ()


class HistoryRequest(NamedTuple):
    """A history with options of its own; see `Recommender.recommend_each`.

    Fields:
      indices: int32, the known items of the history, the oldest first; see `to_indices`.
      unknown: ids of the history that are not known.
      k: length of the list, 1 to V.
      filter_seen: whether items of the history are left out.
      allowed_V: bool [V + 1], the items that may be recommended; see `candidate_mask`.
    """

    indices: np.ndarray
    unknown: list[ItemId]
    k: int
    filter_seen: bool
    allowed_V: np.ndarray


class ServedModel(NamedTuple):
    """The functions and arrays of a trained model that serving needs.

    Fields:
      encode: (params, tokens_BL, positions_BL, segments_BL) -> query_BQD. It is compiled once for
        each function object.
      combine: score_BQV -> score_BV; one function object too.
      params: the first argument of `encode`, on the device or the mesh.
      item_VD: item vectors, row 0 for the padding; on a mesh with rows past V, so that the devices
        have equal parts.
      max_length: items of a history that the model encodes, the latest.
      intermediates: as `encode`, but returns FAME's gate, heads, router and attention for
        `explain`; None for other models.
      facet_HDK: FAME's W_f (eq. 9), or the selectors of branches, float32, for `similar_items`;
        None for other models, and in exports of version 0.2 and before.
      mesh: the devices that share the item vectors; None: one device.
      score_kind: the scale of the scores; see `Recommendation`.
      onnx_file: the model.onnx of the export that the functions were read from, since a program
        that was read cannot be converted; None: they can be.
    """

    encode: Callable[..., Array]
    combine: Callable[[Array], Array]
    params: Any
    item_VD: Array
    max_length: int
    intermediates: Callable[..., dict[str, Array]] | None = None
    mesh: Mesh | None = None
    score_kind: str = DOT
    onnx_file: Path | None = None
    facet_HDK: Array | None = None


class UnknownItemsWarning(UserWarning):
    """No id of a history is in the catalogue, or an id of `allow` or `deny` is not."""


class Recommender:
    """Recommends items of one catalogue to histories of item ids.

    Ids may be given as strings or as numbers: 7, 7.0, '7' and ' 7 ' are one item. Answers hold ids
    of the type that the training data had. Any number of threads may use one recommender.
    """

    def __init__(
        self,
        model: ServedModel,
        item_ids: Sequence[str],
        count_V: np.ndarray,
        titles: Sequence[str] = (),
        card: dict[str, Any] | None = None,
        id_type: Literal['str', 'int'] = 'str',
        filter_seen: bool = True,
        head_names: Sequence[str] = (),
    ):
        """Joins a model with its catalogue; `export.load` and `stages` call this.

        Args:
          model: the trained model.
          item_ids: V + 1 ids, the first '' for the padding.
          count_V: int [V + 1], number of actions by item, from which popularity follows.
          titles: V + 1 titles, or none.
          card: where model and data come from, and the test metrics.
          id_type: the type of ids in answers.
          filter_seen: whether items of a history are left out where a call does not say; False for
            data in which users come back to the same items.
          head_names: of heads or branches, distinct, such as their facets where each was trained
            for one (FAME+); none: the names are 'head 1', 'head 2' and so on.

        Raises:
          ValueError: if id_type is 'int' and an id is not an integer.
        """
        self.model = model
        self.item_ids = list(item_ids)
        self.titles = list(titles) or [''] * len(self.item_ids)
        self.card = card or {}
        self.count_V = np.asarray(count_V)
        self.id_type = id_type
        self.filter_seen = filter_seen
        self.head_names = list(head_names)
        self._answer_ids: list[ItemId] = self.item_ids
        if id_type == 'int':
            self._answer_ids = ['', *map(int, self.item_ids[1:])]
        self._index = {item_id: index for index, item_id in enumerate(self.item_ids) if item_id}
        self.by_popularity_V = np.argsort(-self.count_V[1:], kind='stable') + 1
        self._has_titles = any(self.titles)
        self._all_allowed_V = np.arange(len(self.item_ids)) > 0
        self._has_warned = False

    @property
    def num_items(self) -> int:
        """V."""
        return len(self.item_ids) - 1

    @property
    def batch_size(self) -> int:
        """Histories that the device scores at a time; fewer for a large catalogue."""
        mesh = self.model.mesh
        local_items = table_rows(self.num_items, mesh) // (mesh.shape[MODEL] if mesh else 1)
        return max(1, min(MAX_BATCH, MAX_SCORES // local_items))

    def warm_up(
        self,
        k: int = 100,
        batch_sizes: Iterable[int] = (1, FEW_ROWS, MAX_BATCH),
        explain: bool = False,
    ) -> None:
        """Compiles all programs ahead that later calls need, so that none waits for the compiler.

        Afterwards `recommend`, `recommend_many`, `similar_items` and `query` compile nothing, for
        histories of any length, any filters and lists of up to k items. Calls that need a program
        which is not compiled yet wait for it, and other calls do not.

        Args:
          k: the longest list; with `explain` also of explanations.
          batch_sizes: numbers of histories in one call: 1 for `recommend`, others for
            `recommend_many`. 2 to 51 share their programs, 52 and more do too.
          explain: whether the programs of `explain` are compiled too.

        Raises:
          ValueError: if k or a number of histories is less than 1.
        """
        k = min(_positive(k), self.num_items)
        lists = topk.list_lengths(k, self.num_items)
        for size in sorted({self.rows_for(_positive(n)) for n in batch_sizes}):
            allowed_BX = rows.candidate_bits(self._all_allowed_V, [np.zeros(0, int)] * size)
            for length in eval_batches.row_lengths(self.model.max_length):
                history = np.ones(length, np.int32)
                (batch,) = rows.batches([history], self.model.max_length, size)
                query_BQD = self.encode(batch)
            for n in lists:
                self._best(n, query_BQD, allowed_BX)
        for n in lists if self.num_items > 1 else ():
            for by in ('all', *self.facets[:1]):  # the heads share a program
                self.similar_items(self.item_ids[1], n, by)
        if explain:
            from fame_jax.serving import explain as explaining

            explaining.warm_up(self, k)

    def recommend(
        self,
        history: Iterable[ItemId],
        k: int = 20,
        *,
        filter_seen: bool | None = None,
        allow: Iterable[ItemId] | None = None,
        deny: Iterable[ItemId] = (),
        unknown: Literal['popularity', 'raise'] = 'popularity',
    ) -> Recommendation:
        """Recommends k items to one history.

        Args:
          history: item ids, the oldest first. Ids that are not in the catalogue are skipped.
          k: length of the list, at least 1.
          filter_seen: whether items of the history are left out. None: as `self.filter_seen` says,
            which is False for data in which most users come back to the same items.
          allow: ids of the only items that may be recommended; None: all.
          deny: ids of items that may not be recommended. Unknown ids of the two are skipped with a
            warning.
          unknown: for a history whose ids are all unknown: 'popularity' gives the most popular
            items, with one warning for each recommender; 'raise' raises an error. An empty history
            gets the most popular items in either case.

        Raises:
          ValueError: if k is less than 1, if no id of `allow` is known, or, with unknown='raise',
            if no id of the history is.
          TypeError: if an id is neither a string nor a whole number, or a single id is given.
          FloatingPointError: if a score is NaN.
        """
        options = self._check(k, filter_seen, allow, deny, unknown)
        return next(self._recommend([history], *options, stacklevel=4))

    def recommend_many(
        self,
        histories: Iterable[Iterable[ItemId]],
        k: int = 20,
        *,
        filter_seen: bool | None = None,
        allow: Iterable[ItemId] | None = None,
        deny: Iterable[ItemId] = (),
        unknown: Literal['popularity', 'raise'] = 'popularity',
    ) -> Iterator[Recommendation]:
        """Recommends k items to each history, in their order; see `recommend`.

        Histories are read some thousand ahead of the answers, so that memory does not grow with
        their number.
        """
        options = self._check(k, filter_seen, allow, deny, unknown)
        return self._recommend(histories, *options, stacklevel=3)

    def recommend_each(self, requests: Sequence[HistoryRequest]) -> list[Recommendation]:
        """Recommends to histories that have options of their own, in common batches.

        Lists are those of `recommend`. A batch computes as many items as the longest of its lists
        needs. There is no warning where no item of a history is known: the answer says so.

        Raises:
          FloatingPointError: if a score is NaN.
        """
        return list(self._finish(requests, self._start(requests)))

    def recommend_frame(
        self,
        frame: Any,
        k: int = 20,
        *,
        user: str = 'user',
        item: str = 'item',
        time: str | None = 'time',
        filter_seen: bool | None = None,
        allow: Iterable[ItemId] | None = None,
        deny: Iterable[ItemId] = (),
        unknown: Literal['popularity', 'raise'] = 'popularity',
    ) -> Any:
        """Recommends k items to each user of a data frame; see `recommend`.

        Args:
          frame: one row for each action: a DataFrame of pandas or polars, or an Arrow table.
          k: length of each list.
          user: the column of user ids.
          item: the column of item ids.
          time: the column by which a user's actions are ordered (stable sort); None: the rows are
            in order.
          filter_seen, allow, deny, unknown: as in `recommend`.

        Returns:
          A frame of the same library, users in the order of their first rows, with the columns
          user, rank (from 1), item, title (where titles are known), score, score_kind and count:
          the number of actions, which only the most popular items have, and they have no score.

        Raises:
          UserError: if a column is missing or holds nulls.
          TypeError: for another kind of frame.
        """
        from fame_jax.serving import frames

        first_rows, histories = frames.read(frame, user, item, time)
        options = self._check(k, filter_seen, allow, deny, unknown)
        answers = list(self._recommend(histories, *options, stacklevel=4))
        return frames.make(frame, user, first_rows, answers, self.id_type, self._has_titles)

    def similar_items(self, item: ItemId, k: int = 10, by: str | int = 'all') -> Recommendation:
        """The k items whose vectors have the largest cosine with the item's, itself left out.

        Args:
          item: an item id.
          k: length of the list, at least 1.
          by: 'all', the whole item vectors; or a head of FAME, by its number from 1 on or by its
            name in `facets`, whose view of the items (x_v W_f^h, eq. 9) is compared; or a branch
            in the same way, whose own item vectors are compared.

        Raises:
          ValueError: if the item is not in the catalogue, k is less than 1, or there is no such
            head or branch.
        """
        self._known([item], 'similar_items')
        return next(self.similar_items_many([item], k, by))

    def similar_items_many(
        self, items: Iterable[ItemId], k: int = 10, by: str | int = 'all'
    ) -> Iterator[Recommendation]:
        """The items similar to each item, in their order; see `similar_items`.

        An id that is not in the catalogue has an empty list, and is its `unknown`.
        """
        k, others = _positive(k), self.num_items - 1
        facet_DK = self._facet(by)
        return self._similar(items, k, others, facet_DK)

    @property
    def facets(self) -> list[str]:
        """The values of `by` in `similar_items` besides 'all': names of heads or of branches."""
        if self.model.facet_HDK is None:
            return []
        return [self.head_name(h) for h in range(len(self.model.facet_HDK))]

    def head_name(self, head: int) -> str:
        """The name of a head or branch, counted from 0: its facet, or 'head 1'."""
        return self.head_names[head] if self.head_names else f'head {head + 1}'

    def query(self, history: Iterable[ItemId]) -> np.ndarray:
        """The query vectors of a history, float32 [Q, D]; Q is 1 for most models, FAME included.

        With one query an item's score is the inner product of query and item vector, so that any
        index of inner products can search it. Several queries are scored each, and `model.combine`
        makes one score of them.

        Raises:
          ValueError: if no id of the history is in the catalogue.
        """
        indices = self._known(history, 'query')
        (batch,) = rows.batches([indices], self.model.max_length, 1)
        return np.asarray(self.encode(batch), np.float32)[0]

    def explain(
        self,
        history: Iterable[ItemId],
        k: int = 10,
        *,
        filter_seen: bool | None = None,
        allow: Iterable[ItemId] | None = None,
        deny: Iterable[ItemId] = (),
        target: ItemId | None = None,
    ) -> 'Explanation':
        """Recommends k items and computes which past items, heads and experts they rest on.

        See `explain.explain`.
        """
        from fame_jax.serving import explain

        return explain.explain(
            self, history, k, filter_seen=filter_seen, allow=allow, deny=deny, target=target
        )

    def export(self, folder: str | Path) -> None:
        """Writes one folder from which `export.load` makes this recommender again.

        A warning says why the folder has no model.onnx, if it has none.

        Raises:
          UserError: if it cannot be written, or holds something that is not an export.
        """
        from fame_jax.serving import export

        missing = export.save(self, folder)
        if missing:
            warnings.warn(f'{folder}: {missing}', UserWarning, stacklevel=2)

    def with_string_ids(self) -> 'Recommender':
        """The same recommender, but its answers hold every id as a string."""
        same = copy.copy(self)
        same.id_type, same._answer_ids = 'str', same.item_ids
        return same

    def to_indices(self, ids: Iterable[ItemId]) -> tuple[np.ndarray, list[ItemId]]:
        """The indices of the known ids, int32, in their order; and the ids that are not known.

        Raises:
          TypeError: if an id is neither a string nor a whole number, or a single id is given.
        """
        indices, unknown = [], []
        for item_id in id_list(ids):
            index = self._index.get(item_id) if type(item_id) is str else None
            if index is None:
                index = self._index.get(id_text(item_id))
            if index is None:
                unknown.append(item_id)
            else:
                indices.append(index)
        return np.array(indices, np.int32), unknown

    def to_ids(self, indices: np.ndarray) -> list[ItemId]:
        """The ids of item indices, in the type of the training data."""
        return [self._answer_ids[index] for index in indices.tolist()]

    def candidate_mask(
        self, allow: Iterable[ItemId] | None = None, deny: Iterable[ItemId] = ()
    ) -> tuple[np.ndarray, list[ItemId]]:
        """The items that may be recommended, bool [V + 1]; and the ids that are not known.

        Args:
          allow: ids of the only items that may be recommended; None: all.
          deny: ids of items that may not be recommended.

        Raises:
          ValueError: if `allow` has ids and none of them is known.
        """
        allowed_V, unknown = self._all_allowed_V.copy(), []
        if allow is not None:
            indices, unknown = self.to_indices(allow)
            if unknown and not len(indices):
                raise ValueError(f'allow: none of {some(unknown)} is in the catalogue')
            allowed_V[:] = False
            allowed_V[indices] = True
        indices, more = self.to_indices(deny)
        allowed_V[indices] = False
        return allowed_V, [*unknown, *more]

    def encode(self, batch: rows.HistoryRows) -> Array:
        """The queries of a batch of rows, [B, Q, D]."""
        model = self.model
        return topk.encode_rows(model.encode, model.params, batch.inputs, mesh=model.mesh)

    def rows_for(self, histories: int) -> int:
        """Rows of the batches in which so many histories are encoded; one of three numbers."""
        if histories == 1:
            return 1
        if histories >= NEARLY_FULL * self.batch_size:
            return self.batch_size
        return min(FEW_ROWS, self.batch_size)

    def _known(self, ids: Iterable[ItemId], method: str) -> np.ndarray:
        """The indices of ids of which at least one has to be known."""
        indices, unknown = self.to_indices(ids)
        if not len(indices):
            raise ValueError(f'{method}: none of {some(unknown)} is in the catalogue')
        return indices

    def _facet(self, by: str | int) -> Array | None:
        """The projection that `similar_items` names; None for whole item vectors."""
        if by == 'all':
            return None
        if self.model.facet_HDK is None:
            why = f'{self.card.get("model") or "this model"} has no heads and no branches'
            if self.model.intermediates is not None:
                why = 'the export is of an older version, without the projections of its heads'
            raise ValueError(f"by={by!r}: {why}; use by='all'")
        names = self.facets
        is_number = isinstance(by, int | np.integer) and not isinstance(by, bool)
        if is_number and 1 <= by <= len(names):
            return self.model.facet_HDK[int(by) - 1]
        if by in names:
            return self.model.facet_HDK[names.index(by)]
        raise ValueError(
            f"by={by!r}: there is no such head or branch; use 'all', a number from 1 to "
            f'{len(names)}, or one of {", ".join(map(repr, names))}'
        )

    def _similar(
        self, items: Iterable[ItemId], k: int, others: int, facet_DK: Array | None
    ) -> Iterator[Recommendation]:
        """Lists for batches of items, of 1 or of `batch_size`, so that two programs do."""
        for chunk in _chunked(items, self.batch_size):
            known = [self.to_indices([item]) for item in chunk]
            index_B = np.array([found[0] if len(found) else 0 for found, _ in known], np.int32)
            item_BK, cosine_BK = np.zeros((2, len(chunk), 0))
            if others and index_B.any():
                missing = (self.batch_size if len(chunk) > 1 else 1) - len(chunk)
                rounded = topk.rounded_k(min(k, others), others)
                index_B = np.pad(index_B, (0, missing))
                arguments = self.model.item_VD, index_B, self.num_items, facet_DK
                found = topk.similar_items(rounded, *arguments)
                item_BK, cosine_BK = (np.asarray(x)[:, :k] for x in found)
            for row, (found, unknown) in enumerate(known):
                if not len(found):
                    yield Recommendation([], [], unknown, '', COSINE)
                    continue
                item_K, cosine_K = item_BK[row].astype(int), cosine_BK[row].tolist()
                titles = self._titles_of(item_K)
                yield Recommendation(self.to_ids(item_K), cosine_K, [], '', COSINE, titles)

    def _check(
        self,
        k: int,
        filter_seen: bool | None,
        allow: Iterable[ItemId] | None,
        deny: Iterable[ItemId],
        unknown: str,
    ) -> tuple[int, bool, np.ndarray, str]:
        """The arguments of `_recommend`, checked before the first history is read."""
        if unknown not in ('popularity', 'raise'):
            raise ValueError(f"unknown={unknown!r}: use 'popularity' or 'raise'")
        k = min(_positive(k), self.num_items)
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        deny = id_list(deny)
        if allow is None and not deny:
            return k, filter_seen, self._all_allowed_V, unknown
        allowed_V, strangers = self.candidate_mask(allow, deny)
        if strangers:
            line = f'ids of allow or deny that are not in the catalogue: {some(strangers)}'
            warnings.warn(line, UnknownItemsWarning, stacklevel=3)
        return k, filter_seen, allowed_V, unknown

    def _recommend(
        self,
        histories: Iterable[Iterable[ItemId]],
        k: int,
        filter_seen: bool,
        allowed_V: np.ndarray,
        unknown: str,
        stacklevel: int,
    ) -> Iterator[Recommendation]:
        """Recommends to chunks of histories; the device scores one while the last is read."""
        started = None
        options = k, filter_seen, allowed_V
        for requests in self._chunks(histories, options):
            for request in requests:
                if request.unknown and not len(request.indices):
                    self._report_unknown(request.unknown, unknown, stacklevel)
            before, started = started, (requests, self._start(requests))
            if before:
                yield from self._finish(*before)
        if started:
            yield from self._finish(*started)

    def _chunks(
        self, histories: Iterable[Iterable[ItemId]], options: tuple[int, bool, np.ndarray]
    ) -> Iterator[list[HistoryRequest]]:
        """The histories in lists of limited numbers of histories and of items."""
        chunk: list[HistoryRequest] = []
        items = 0
        for history in histories:
            chunk.append(HistoryRequest(*self.to_indices(history), *options))
            items += len(chunk[-1].indices) + len(chunk[-1].unknown)
            if len(chunk) == BATCHES_AHEAD * self.batch_size or items >= ITEMS_AHEAD:
                yield chunk
                chunk, items = [], 0
        if chunk:
            yield chunk

    def _start(
        self, requests: Sequence[HistoryRequest]
    ) -> list[tuple[np.ndarray, tuple[Array, Array]]]:
        """Starts the device on histories with a known item: [(history_B, (item_BK, score_BK))]."""
        scored = np.array([i for i, request in enumerate(requests) if len(request.indices)], int)
        if not len(scored):
            return []
        nothing, started = np.zeros(0, np.int32), []
        size, k = self.rows_for(len(scored)), max(request.k for request in requests)
        known = [requests[i].indices for i in scored]
        for batch in rows.batches(known, self.model.max_length, size):
            history_B = np.where(batch.history_B < 0, -1, scored[batch.history_B])
            # Rows of padding have the options of the last request; their results are not read.
            row_requests = [requests[i] for i in history_B]
            seen = [
                request.indices if request.filter_seen and i >= 0 else nothing
                for i, request in zip(history_B, row_requests)
            ]
            allowed_V = row_requests[0].allowed_V
            if any(request.allowed_V is not allowed_V for request in row_requests):
                allowed_V = np.stack([request.allowed_V for request in row_requests])
            bits_BX = rows.candidate_bits(allowed_V, seen)
            started.append((history_B, self._best(k, self.encode(batch), bits_BX)))
        return started

    def _best(self, k: int, query_BQD: Array, bits_BX: np.ndarray) -> tuple[Array, Array]:
        """At least k items and their scores for each row, on the device."""
        model, k = self.model, topk.rounded_k(k, self.num_items)
        return topk.top_k_items(
            model.combine, k, query_BQD, model.item_VD, bits_BX, mesh=model.mesh
        )

    def _finish(
        self, requests: Sequence[HistoryRequest], started: list[tuple]
    ) -> Iterator[Recommendation]:
        """Reads the device's results, and yields them in the order of the histories."""
        best: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for history_B, (item_BK, score_BK) in started:
            item_BK, score_BK = np.asarray(item_BK), np.asarray(score_BK)
            for row in np.flatnonzero(history_B >= 0):
                k = requests[history_B[row]].k
                item_K, score_K = item_BK[row, :k], score_BK[row, :k]
                if np.isnan(score_K).any():
                    raise FloatingPointError('a score is NaN; the model cannot recommend')
                left_K = score_K > -np.inf
                best[history_B[row]] = item_K[left_K], score_K[left_K]
        for i, request in enumerate(requests):
            kind = ('', self.model.score_kind) if i in best else ('popularity', POPULARITY)
            item_K, score_K = best[i] if i in best else self._popular(request.k, request.allowed_V)
            ids, titles = self.to_ids(item_K), self._titles_of(item_K)
            yield Recommendation(ids, score_K.tolist(), request.unknown, *kind, titles)

    def _popular(self, k: int, allowed_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k allowed items with the most actions, and these numbers."""
        item_K = self.by_popularity_V[allowed_V[self.by_popularity_V]][:k]
        return item_K, self.count_V[item_K].astype(float)

    def _titles_of(self, item_K: np.ndarray) -> Sequence[str]:
        """The titles of item indices; empty if the catalogue has none."""
        return [self.titles[item] for item in item_K.tolist()] if self._has_titles else ()

    def _report_unknown(self, unknown_ids: list[ItemId], unknown: str, stacklevel: int) -> None:
        """Raises or warns for a history whose ids are all unknown."""
        line = f'no id of a history is in the catalogue: {some(unknown_ids)}'
        if unknown == 'raise':
            raise ValueError(line)
        if not self._has_warned:
            self._has_warned = True
            advice = 'the most popular items are recommended, here and without a warning later'
            warnings.warn(f'{line}; {advice}', UnknownItemsWarning, stacklevel=stacklevel)


def single_query(score_BQV: Array) -> Array:
    """The `combine` of a model that has one query for each history, [B, V]."""
    return score_BQV[:, 0]


def _positive(k: int) -> int:
    if operator.index(k) < 1:
        raise ValueError(f'k={k}: a list has at least one item')
    return operator.index(k)


def _chunked(items: Iterable[ItemId], size: int) -> Iterator[list[ItemId]]:
    """Lists of up to so many items."""
    items = iter(id_list(items))
    while chunk := list(itertools.islice(items, size)):
        yield chunk
