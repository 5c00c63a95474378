"""Attention, feed-forward and block: what the backbone and FAME share.

Everything positional depends on the prefix alone: on the position from the start of a history, or
on the distance between two of its items. So a history means the same wherever it lies in a row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any

# Of the BERT-style SASRec of S3-Rec, ICLRec and RecBole.
normal_init = nn.initializers.normal(stddev=0.02)

# Finite, so that a row of padding gives uniform weights and never NaN.
MASKED = -1e9

# GELU by its tanh form; S3-Rec and RecBole take erf, which differs by 5e-4 at the most.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {'gelu': nn.gelu, 'relu': nn.relu}


class Dropout(nn.Module):
    """Dropout that draws a byte an element, where the usual one draws four: a third of the cost.

    The rate is rounded to a multiple of 1/256, and the scale goes by the rounded rate, so that the
    expectation stays exact.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """The same as x, or in training x with entries set to 0; wants the rng 'dropout'."""
        return thin(x, self.draw(x.shape, train=train), self.rate)

    def draw(self, shape: tuple[int, ...], *, train: bool) -> Array | None:
        """The bytes that `thin` wants, for entries that are not there yet; None: all are kept."""
        if not train or _kept(self.rate) == 256:
            return None
        size = math.prod(shape)
        words = jax.random.bits(self.make_rng('dropout'), (-(-size // 4),), jnp.uint32)
        octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:size]
        return octets.reshape(shape)


def thin(x: Array, octets: Array | None, rate: float) -> Array:
    """Sets entries of x to 0, those whose byte, drawn by `Dropout.draw`, says so."""
    if octets is None:
        return x
    kept = _kept(rate)
    return jnp.where(octets < kept, x * (256 / max(kept, 1)), 0)


def _kept(rate: float) -> int:
    """The bytes of 256 that keep an entry."""
    return round((1 - rate) * 256)


def visible(segments_BL: Array) -> Array:
    """What a position may look at: its own history, itself and earlier; bool [B, Q, S]."""
    length = segments_BL.shape[1]
    same_BQS = segments_BL[:, :, None] == segments_BL[:, None, :]
    real_B1S = (segments_BL > 0)[:, None, :]
    causal_1QS = jnp.tri(length, dtype=bool)[None]
    return same_BQS & real_B1S & causal_1QS


def distance_bias(table_HL: Array, length: int) -> Array:
    """Spreads a bias per distance over pairs: [H, Q, S] from [H, distances].

    Distances past the table's end take its last entry; pairs with S after Q are masked elsewhere.
    """
    distance_QS = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    return table_HL[:, jnp.clip(distance_QS, 0, table_HL.shape[1] - 1)]


def attend(
    query_BQHNK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    mask_BQS: Array,
    bias_HQS: Array | None,
    scale: float,
    drop: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """N queries in each head over that head's keys and values (eqs. 14, 15).

    Args:
      query_BQHNK: queries of the positions that are asked for.
      key_BSHK: keys of all positions.
      value_BSHK: values of all positions.
      mask_BQS: bool, True where Q may look at S.
      bias_HQS: added to the logits of every expert of a head; None: nothing.
      scale: the logits are multiplied by it before the bias.
      drop: dropout of the attention weights.

    Returns:
      mixed_BQHNK: the values, weighted.
      weight_BHNQS: float32, sums to 1 over S.
    """
    weight_BHNQS = weigh(query_BQHNK, key_BSHK, mask_BQS, bias_HQS, scale)
    dropped_BHNQS = drop(weight_BHNQS).astype(value_BSHK.dtype)
    mixed_BHNQK = jnp.einsum('BHNQS,BSHK->BHNQK', dropped_BHNQS, value_BSHK)
    return mixed_BHNQK.transpose(0, 3, 1, 2, 4), weight_BHNQS


def weigh(
    query_BQHNK: Array, key_BSHK: Array, mask_BQS: Array, bias_HQS: Array | None, scale: float
) -> Array:
    """The weights of `attend` alone, float32 [B, H, N, Q, S]."""
    # In this order the products are of N * Q rows, and no transposed copy of the logits is made.
    query_BHNQK = (query_BQHNK * scale).transpose(0, 2, 3, 1, 4)
    logit_BHNQS = jnp.einsum('BHNQK,BSHK->BHNQS', query_BHNQK, key_BSHK)
    # Once for all experts of a head.
    bias_BHQS = jnp.where(mask_BQS[:, None], 0 if bias_HQS is None else bias_HQS[None], MASKED)
    return jax.nn.softmax(logit_BHNQS.astype(jnp.float32) + bias_BHQS[:, :, None], axis=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with output projection (eqs. 2-4)."""

    num_heads: int
    dropout: float
    max_distance: int  # entries of the distance bias; 0: none
    bias: bool
    scale: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, Array]:
        """The attended values [B, Q, D] and the weights [B, H, 1, Q, S]; Q is 1 if `last`."""
        width = x_BLD.shape[-1]
        head_width = width // self.num_heads
        shape_HDK = (self.num_heads, width, head_width)
        asked_BQD = x_BLD[:, -1:] if last else x_BLD
        query_BQHK = project(self, 'query', shape_HDK, 'BQD,HDK->BQHK', asked_BQD)
        key_BSHK = project(self, 'key', shape_HDK, 'BSD,HDK->BSHK', x_BLD)
        value_BSHK = project(self, 'value', shape_HDK, 'BSD,HDK->BSHK', x_BLD)
        mixed_BQHNK, weight_BHNQS = attend(
            query_BQHK[:, :, :, None],
            key_BSHK,
            value_BSHK,
            mask_BLL[:, -1:] if last else mask_BLL,
            relative_bias(self, x_BLD.shape[1], last),
            attention_scale(self.scale, width, head_width),
            functools.partial(Dropout(self.dropout), train=train),
        )
        w_HKD = self.param('output', normal_init, (self.num_heads, head_width, width))
        bias_D = self.param('output_bias', nn.initializers.zeros, (width,))
        mixed_BQHK = mixed_BQHNK[:, :, :, 0]
        out_BQD = jnp.einsum('BQHK,HKD->BQD', mixed_BQHK, w_HKD.astype(self.dtype))
        return out_BQD + bias_D[None, None].astype(self.dtype), weight_BHNQS


def project(module: nn.Module, name: str, shape: tuple[int, ...], equation: str, x: Array) -> Array:
    """One einsum with a parameter of the module, and a bias over its heads if the module has any.

    The parameter's axes are heads first, D second to last, K last; the bias leaves D out.
    """
    kernel = module.param(name, normal_init, shape).astype(module.dtype)
    y = jnp.einsum(equation, x, kernel)
    if module.bias:
        bias_shape = (*shape[:-2], shape[-1])
        bias = module.param(f'{name}_bias', nn.initializers.zeros, bias_shape)
        y += jnp.expand_dims(bias, range(y.ndim - bias.ndim)).astype(module.dtype)
    return y


def relative_bias(module: nn.Module, length: int, last: bool) -> Array | None:
    """The module's learned bias per head and distance, spread over pairs; [H, Q, S] or None."""
    if not module.max_distance:
        return None
    shape_HL = (module.num_heads, module.max_distance)
    bias_HQS = distance_bias(module.param('distance', nn.initializers.zeros, shape_HL), length)
    return bias_HQS[:, -1:] if last else bias_HQS


def attention_scale(scale: str, width: int, head_width: int) -> float:
    """1 / sqrt(K) as in eq. 14, or 1 / sqrt(D) as eq. 3 prints it."""
    return (head_width if scale == 'head' else width) ** -0.5


class FeedForward(nn.Module):
    """Two dense layers (eq. 5); inner width and activation as configured."""

    inner_width: int
    activation: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        inner = nn.Dense(self.inner_width, kernel_init=normal_init, dtype=self.dtype, name='up')
        outer = nn.Dense(x_BLD.shape[-1], kernel_init=normal_init, dtype=self.dtype, name='down')
        return outer(ACTIVATIONS[self.activation](inner(x_BLD)))


class Block(nn.Module):
    """The backbone's block, post-LayerNorm: LN(x + attention), then LN(. + feed-forward)."""

    num_heads: int
    inner_width: int
    activation: str
    dropout: float
    max_distance: int
    bias: bool
    scale: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The block's output, [B, L, D] or [B, 1, D] if `last`, and its attention weights."""
        drop = functools.partial(Dropout(self.dropout), train=train)
        attention = Attention(
            self.num_heads,
            self.dropout,
            self.max_distance,
            self.bias,
            self.scale,
            self.dtype,
            name='attention',
        )
        mixed_BQD, weight_BHNQS = attention(x_BLD, mask_BLL, train=train, last=last)
        asked_BQD = x_BLD[:, -1:] if last else x_BLD
        norm = nn.LayerNorm(dtype=self.dtype, name='attention_norm')
        h_BQD = norm(asked_BQD + drop(mixed_BQD))
        feed_forward = FeedForward(
            self.inner_width, self.activation, self.dtype, name='feed_forward'
        )
        norm = nn.LayerNorm(dtype=self.dtype, name='feed_forward_norm')
        return norm(h_BQD + drop(feed_forward(h_BQD))), {'attention_BHNQS': weight_BHNQS}
