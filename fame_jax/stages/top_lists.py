"""The lists that a model recommends to all test users, for metrics beyond accuracy."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fame_jax.data.eval_batches import EvalBatch
from fame_jax.evaluation import head_use, lists
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.serving import topk
from fame_jax.serving.recommender import ServedModel
from fame_jax.serving.rows import candidate_bits
from fame_jax.stages.context import RunContext
from fame_jax.stages.open_recommender import serving_model

MAX_SCORES = 2**26  # most scores of a batch: 256 MiB of float32
# Users whose heads are compared, and so many at a time: FAME's attention of all experts at all
# positions is in memory then.
HEAD_USERS, HEAD_ROWS = 1024, 128


def top_lists(context: RunContext, model: ServedModel, *, masked: bool) -> np.ndarray:
    """The best items for each test target, int32 [R, K], best first; 0 where no item is left.

    In leave one out a user has one target.

    Args:
      context: a prepared run.
      model: the model, on the run's mesh.
      masked: whether items of a history are left out of its list.
    """
    num_items, num_targets = context.data.num_items, context.num_targets('test')
    allowed_V = np.arange(num_items + 1) > 0
    rows = max(1, MAX_SCORES // num_items, context.config.devices.data_parallel)
    item_UK = np.zeros((num_targets, min(lists.K, num_items)), np.int32)
    for batch in _parts(context.eval_batches['test'], rows):
        inputs = batch.tokens_BL, batch.positions_BL, batch.segments_BL
        query_BQD = topk.encode_rows(model.encode, model.params, inputs, mesh=model.mesh)
        # Item 0 is the padding and never a candidate.
        seen = batch.seen_BS if masked else batch.seen_BS[:, :0]
        item_BK, score_BK = topk.top_k_items(
            model.combine,
            item_UK.shape[1],
            query_BQD,
            model.item_VD,
            candidate_bits(allowed_V, seen),
            mesh=model.mesh,
        )
        item_BK = np.where(mesh_lib.gather(score_BK) > -np.inf, mesh_lib.gather(item_BK), 0)
        item_UK[batch.user_B[batch.is_user_B]] = item_BK[batch.is_user_B]
    return item_UK


def use_of_heads(context: RunContext, params: Any) -> dict[str, Any]:
    """The figures of `head_use` over a fixed sample of test users, on one device.

    Args:
      context: a run whose stage finetune is trained.
      params: its parameters, whole.
    """
    module = context.module('finetune')
    model = serving_model(module, jax.device_put(params), context.config.data.max_length)
    allowed_V = np.arange(context.data.num_items + 1) > 0
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for batch in _parts(context.sample_batches('test', HEAD_USERS), HEAD_ROWS):
        inputs = batch.tokens_BL, batch.positions_BL, batch.segments_BL
        out = topk.encode_rows(model.intermediates, model.params, inputs)
        seen = batch.seen_BS if context.selects_masked else batch.seen_BS[:, :0]
        bits_BX = candidate_bits(allowed_V, seen)
        heads = out['head_BHD'].shape[1]
        item_BHK = np.zeros((len(batch.user_B), heads, min(head_use.K, len(allowed_V) - 1)), int)
        for h in range(heads):
            item_BK, score_BK = topk.top_k_items(
                module.combine,
                item_BHK.shape[2],
                out['head_BHD'][:, h, None],
                model.item_VD,
                bits_BX,
            )
            item_BHK[:, h] = np.where(np.asarray(score_BK) > -np.inf, item_BK, 0)
        real_B = batch.is_user_B
        arrays = (out['gate_BH'], out['router_BHN'], item_BHK)
        found.append(tuple(np.asarray(array)[real_B] for array in arrays))
    return head_use.head_use(*(np.concatenate(parts) for parts in zip(*found)))


def _parts(batches: Iterator[EvalBatch], rows: int) -> Iterator[EvalBatch]:
    """The batches in parts of at most so many rows; parts without a user are left out."""
    for batch in batches:
        for start in range(0, len(batch.user_B), rows):
            part = EvalBatch(*(field[start : start + rows] for field in batch))
            if part.is_user_B.any():
                yield part
