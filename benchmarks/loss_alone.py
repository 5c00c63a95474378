"""The full-catalogue cross-entropy alone: value and both gradients, one variant against another.

A section of benchmarks/suite.py. `products` is the three products that no exact gradient can do
without and nothing else, `one product` the first of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.turns import Effort, Program, contest
from fame_jax import losses
from fame_jax.run import Run

TOKENS = {'cpu': 512}  # of a step; elsewhere 16,384
CHUNKS = {'cpu': ((64, 0), (128, 0), (256, 0), (0, 2048), (128, 1024), (256, 1024), (256, 4096))}
LONG_CHUNKS = ((128, 0), (512, 0), (2048, 0), (0, 2048), (2048, 2048), (2048, 8192))

matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def make_data(tokens, items, width, dtype):
    """Queries and a table like those of a cosine similarity with temperature .07; 5 % padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    query_TD = jax.random.normal(keys[0], (tokens, width))
    item_VD = jax.random.normal(keys[1], (items + 1, width))
    query_TD /= 0.07 * jnp.linalg.norm(query_TD, axis=1, keepdims=True)
    item_VD /= jnp.linalg.norm(item_VD, axis=1, keepdims=True)
    target_T = jax.random.randint(keys[2], (tokens,), 1, items + 1)
    weight_T = (jax.random.uniform(keys[3], (tokens,)) > 0.05).astype(jnp.float32)
    return query_TD.astype(dtype), item_VD.astype(dtype), target_T, weight_T


def masked_logits(query_TD, item_VD):
    logit_TV = matmul(query_TD, item_VD.T)
    column_TV = lax.broadcasted_iota(jnp.int32, logit_TV.shape, 1)
    return jnp.where(column_TV == 0, -jnp.inf, logit_TV), column_TV


def mask_gather_logit(query_TD, item_VD, target_T, weight_T):
    logit_TV, _ = masked_logits(query_TD, item_VD)
    picked_T = jnp.take_along_axis(logit_TV, target_T[:, None], axis=1)[:, 0]
    return ((jax.nn.logsumexp(logit_TV, axis=1) - picked_T) * weight_T).sum()


def mask_compare(query_TD, item_VD, target_T, weight_T):
    logit_TV, column_TV = masked_logits(query_TD, item_VD)
    hit_TV = column_TV == target_T[:, None]
    picked_T = jnp.where(hit_TV, jax.nn.log_softmax(logit_TV), 0).sum(axis=1)
    return -(picked_T * weight_T).sum()


def mask_gather_item(query_TD, item_VD, target_T, weight_T):
    logit_TV, _ = masked_logits(query_TD, item_VD)
    picked_T = jnp.einsum('TD,TD->T', query_TD, item_VD[target_T])
    return ((jax.nn.logsumexp(logit_TV, axis=1) - picked_T) * weight_T).sum()


def slice_gather_item(query_TD, item_VD, target_T, weight_T):
    logit_TV = matmul(query_TD, item_VD[1:].T)
    picked_T = jnp.einsum('TD,TD->T', query_TD, item_VD[target_T])
    return ((jax.nn.logsumexp(logit_TV, axis=1) - picked_T) * weight_T).sum()


def slice_items_first(query_TD, item_VD, target_T, weight_T):
    logit_VT = matmul(item_VD[1:], query_TD.T)
    picked_T = jnp.einsum('TD,TD->T', query_TD, item_VD[target_T])
    return ((jax.nn.logsumexp(logit_VT, axis=0) - picked_T) * weight_T).sum()


def by_hand(query_TD, item_VD, target_T, weight_T, items_first):
    """Value and gradients from one unnormalised softmax, without the barrier of `losses`."""
    rest_VD, picked_TD = item_VD[1:], item_VD[target_T]
    if items_first:
        logit_VT = matmul(rest_VD, query_TD.T)
        max_T = logit_VT.max(axis=0)
        exp_VT = jnp.exp(logit_VT - max_T[None, :])
        total_T, exp_TV = exp_VT.sum(axis=0), exp_VT.T
    else:
        logit_TV = matmul(query_TD, rest_VD.T)
        max_T = logit_TV.max(axis=1)
        exp_TV = jnp.exp(logit_TV - max_T[:, None])
        total_T = exp_TV.sum(axis=1)
    loss_T = max_T + jnp.log(total_T) - jnp.einsum('TD,TD->T', query_TD, picked_TD)
    d_query_TD = weight_T[:, None] * (matmul(exp_TV, rest_VD) / total_T[:, None] - picked_TD)
    d_item_VD = matmul(exp_TV.T, query_TD * (weight_T / total_T)[:, None])
    d_item_VD = jnp.pad(d_item_VD, ((1, 0), (0, 0)))
    d_item_VD = d_item_VD.at[target_T].add(-query_TD * weight_T[:, None])
    return (loss_T * weight_T).sum(), (d_query_TD, d_item_VD)


def products(query_TD, item_VD, target_T, weight_T):
    rest_VD = item_VD[1:]
    logit_TV = lax.optimization_barrier(matmul(query_TD, rest_VD.T)).astype(query_TD.dtype)
    return matmul(logit_TV, rest_VD), matmul(query_TD.T, logit_TV)


def one_product(query_TD, item_VD, target_T, weight_T):
    return matmul(query_TD, item_VD.T)


def make_variants(chunks, quick=False):
    """The functions (query_TD, item_VD, target_T, weight_T) that are compared, by name."""

    def graded(loss):
        return jax.value_and_grad(loss, argnums=(0, 1))

    def chunked(chunk_tokens, chunk_items):
        sizes = {'chunk_tokens': chunk_tokens, 'chunk_items': chunk_items}
        return graded(lambda *args: losses.chunked_cross_entropy(*args, **sizes)[0])

    kept = {
        'cross_entropy': graded(lambda *args: losses.cross_entropy(*args)[0]),
        'cross_entropy, value alone': lambda *args: losses.cross_entropy(*args)[0],
        'products': products,
        'one product': one_product,
    }
    kept |= {f'chunked {t} x {v or "all"}': chunked(t, v) for t, v in chunks}
    others = {
        'autodiff, masked, gathered': graded(mask_gather_logit),
        'autodiff, masked, compared': graded(mask_compare),
        'autodiff, masked, items': graded(mask_gather_item),
        'autodiff, sliced, items': graded(slice_gather_item),
        'autodiff, sliced, [V, T]': graded(slice_items_first),
        'by hand, no barrier': functools.partial(by_hand, items_first=False),
        'by hand, [V, T]': functools.partial(by_hand, items_first=True),
    }
    return kept if quick else kept | others


def time_loss(base: Run, effort: Effort, deadline: float) -> list[dict[str, Any]]:
    """The loss over the run's catalogue, for as many tokens as suit the device."""
    backend = jax.default_backend()
    tokens, chunks = TOKENS.get(backend, 16_384), CHUNKS.get(backend, LONG_CHUNKS)
    data = make_data(tokens, base.data.num_items, base.config.width, 'float32')
    about = {'items': tokens, 'catalogue': base.data.num_items, 'width': base.config.width}

    def maker(function: Callable) -> Callable[[], Program]:
        return lambda: Program(function, data, **about)

    several = make_variants(chunks, effort.quick)
    return contest({name: maker(function) for name, function in several.items()}, effort, deadline)
