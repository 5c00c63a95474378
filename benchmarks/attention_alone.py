"""The experts' attention of FAME's block alone: einsums against jax.nn.dot_product_attention.

A section of benchmarks/suite.py. N queries of a head share its key and value, which is
grouped-query attention; a bias per head and pair is added to the logits, and the mask is that of
packed rows. Dropout of the attention weights is part of the trained block, and
jax.nn.dot_product_attention has none: `dropout` tells what it costs the einsums.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import Effort, Program, contest
from fame_jax.models import layers
from fame_jax.run import Run

Array = jax.Array

HEADS, WIDTH = 2, 32
ROWS = {'cpu': 8}  # elsewhere 128
LENGTHS, EXPERTS = (50, 64, 200), (1, 8, 32)
HISTORY = 6  # items of each history in a row


def make_data(rows: int, length: int, experts: int, dtype: str) -> tuple[Array, ...]:
    """query_BQHNK, key_BSHK, value_BSHK, bias_HQS and mask_BQS of rows full of short histories."""
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (rows, length, HEADS, experts, WIDTH), dtype)
    key, value = (jax.random.normal(k, (rows, length, HEADS, WIDTH), dtype) for k in keys[1:3])
    bias = jax.random.normal(keys[3], (HEADS, length, length), dtype)
    segments = np.broadcast_to(1 + np.arange(length) // HISTORY, (rows, length))
    return query, key, value, bias, layers.visible(jnp.asarray(segments))


def einsums(
    query: Array, key: Array, value: Array, bias: Array, mask: Array, rate: float = 0.0
) -> Array:
    """The house's attention; [B, Q, H, N, K]."""
    drop = functools.partial(
        layers.Dropout(rate).apply, {}, train=True, rngs={'dropout': jax.random.key(0)}
    )
    return layers.attend(query, key, value, mask, bias, WIDTH**-0.5, drop)[0]


def grouped(
    query: Array, key: Array, value: Array, bias: Array, mask: Array, implementation: str
) -> Array:
    """The same by jax.nn.dot_product_attention, whose query heads are the experts of all heads."""
    rows, length, heads, experts, width = query.shape
    out = jax.nn.dot_product_attention(
        query.reshape(rows, length, heads * experts, width),
        key,
        value,
        bias=jnp.repeat(bias, experts, axis=0)[None],
        mask=mask[:, None],
        scale=width**-0.5,
        implementation=implementation,
    )
    return out.reshape(query.shape)


def backward(attention: Callable[..., Array]) -> Callable[..., Any]:
    """Forward and backward: the gradients by query, key, value and bias."""

    def total(*data: Array) -> Array:
        return jnp.sum(jnp.square(attention(*data).astype(jnp.float32)))

    return jax.grad(total, argnums=(0, 1, 2, 3))


def contenders() -> dict[str, tuple[Callable[..., Array], str]]:
    """Functions and dtypes by name; the bfloat16 ones where a device is made for them."""
    found = {
        'einsums': (einsums, 'float32'),
        'dropout': (functools.partial(einsums, rate=0.5), 'float32'),
        'grouped': (functools.partial(grouped, implementation='xla'), 'float32'),
    }
    if jax.default_backend() != 'cpu':
        found['bfloat16'] = einsums, 'bfloat16'
        found['cuDNN'] = functools.partial(grouped, implementation='cudnn'), 'bfloat16'
    return found


def time_attention(base: Run, effort: Effort, deadline: float) -> list[dict[str, Any]]:
    """Rows as long as they come, experts as many; contenders of one shape take turns."""
    rows = ROWS.get(jax.default_backend(), 128)
    effort = effort._replace(rounds=min(effort.rounds, 4), seconds=effort.seconds / 2)
    records = []
    for experts in (8,) if effort.quick else EXPERTS:
        for length in LENGTHS:
            for what in ('fwd', 'fwd+bwd'):
                makers = {
                    f'L {length} N {experts} {what}: {name}': functools.partial(
                        _program, function, what, (rows, length, experts, dtype)
                    )
                    for name, (function, dtype) in contenders().items()
                }
                records += contest(makers, effort, deadline)
    return records


def _program(function: Callable[..., Array], what: str, shape: tuple) -> Program:
    rows, length, _, dtype = shape
    function = function if what == 'fwd' else backward(function)
    return Program(function, make_data(*shape), items=rows * length, dtype=dtype)
