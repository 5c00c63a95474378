"""Attention, feed-forward layer and Transformer block, shared by the backbone and FAME.

Everything positional depends on the prefix alone: on an item's position from the start of its
history, or on the distance between two items. A history therefore has the same encoding wherever
it is placed in a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# As in the BERT-style SASRec of S3-Rec, ICLRec and RecBole.
normal_init = nn.initializers.normal(stddev=0.02)

# The logit of a masked pair. It is finite, so that a row of padding gives uniform attention weights
# and not NaN.
MASKED = -1e9


class Dropout(nn.Module):
    """Dropout that decides about an entry by one random byte; the rate may be a traced scalar.

    flax.linen.Dropout draws four bytes for each entry; drawing one costs a third of the time. The
    rate is rounded to a multiple of 1/256, and kept entries are scaled by the rounded rate, so that
    the expectation is exact.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """x, or in training x with entries set to 0; needs the rng 'dropout'."""
        return apply_dropout(x, self.draw_bits(x.shape, train=train), self.rate)

    def draw_bits(self, shape: tuple[int, ...], *, train: bool) -> Array | None:
        """The bytes for `apply_dropout`, uint8 of this shape; None: nothing is dropped.

        They can be drawn before the entries are computed.
        """
        if not train or (isinstance(self.rate, float | int) and _kept(self.rate) == 256):
            return None
        size = math.prod(shape)
        words = jax.random.bits(self.make_rng('dropout'), (-(-size // 4),), jnp.uint32)
        octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:size]
        return octets.reshape(shape)


def apply_dropout(x: Array, dropout_bits: Array | None, rate: float) -> Array:
    """Sets entries of x to 0 according to the bytes of `Dropout.draw_bits`, and scales the rest."""
    if dropout_bits is None:
        return x
    kept = _kept(rate)
    if isinstance(kept, int):
        return jnp.where(dropout_bits < kept, x * (256 / max(kept, 1)), 0)
    scale = (256 / jnp.maximum(kept, 1)).astype(x.dtype)
    return jnp.where(dropout_bits < kept, x * scale, 0)


def _kept(rate: float | Array) -> int | Array:
    """Of the 256 values of a byte, the number that keeps an entry; of a traced rate an array."""
    kept = (1 - rate) * 256
    return round(kept) if isinstance(kept, float | int) else jnp.round(kept).astype(jnp.int32)


def attention_mask(segments_BL: Array) -> Array:
    """The causal mask of packed rows; bool [B, Q, S].

    A position attends to itself and to earlier positions of its own history.
    """
    length = segments_BL.shape[1]
    same_BQS = segments_BL[:, :, None] == segments_BL[:, None, :]
    real_B1S = (segments_BL > 0)[:, None, :]
    causal_1QS = jnp.tri(length, dtype=bool)[None]
    return same_BQS & real_B1S & causal_1QS


def distance_bias(table_HL: Array, length: int) -> Array:
    """A bias for each pair of positions, [H, Q, S], from a bias for each distance, [H, distances].

    Distances past the table's end take its last entry. Pairs with S after Q are masked elsewhere.
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
    """Attention with N queries in each head over that head's keys and values (eqs. 14, 15).

    Args:
      query_BQHNK: queries.
      key_BSHK: keys of all positions.
      value_BSHK: values of all positions.
      mask_BQS: bool, True where Q attends to S.
      bias_HQS: added to the logits of all queries of a head; None: no bias.
      scale: factor of the logits, before the bias.
      drop: dropout of the attention weights.

    Returns:
      mixed_BQHNK: the weighted sum of the values.
      weight_BHNQS: the weights before dropout, float32; they sum to 1 over S.
    """
    weight_BHNQS = attention_weights(query_BQHNK, key_BSHK, mask_BQS, bias_HQS, scale)
    dropped_BHNQS = drop(weight_BHNQS).astype(value_BSHK.dtype)
    mixed_BHNQK = jnp.einsum('BHNQS,BSHK->BHNQK', dropped_BHNQS, value_BSHK)
    return mixed_BHNQK.transpose(0, 3, 1, 2, 4), weight_BHNQS


def attention_weights(
    query_BQHNK: Array, key_BSHK: Array, mask_BQS: Array, bias_HQS: Array | None, scale: float
) -> Array:
    """The weights of `attend` alone, float32 [B, H, N, Q, S]."""
    # With this order of axes the product has N * Q rows and needs no transposed copy of the logits.
    query_BHNQK = (query_BQHNK * scale).transpose(0, 2, 3, 1, 4)
    logit_BHNQS = jnp.einsum('BHNQK,BSHK->BHNQS', query_BHNQK, key_BSHK)
    # The bias is the same for all experts of a head.
    bias_BHQS = jnp.where(mask_BQS[:, None], 0 if bias_HQS is None else bias_HQS[None], MASKED)
    return jax.nn.softmax(logit_BHNQS.astype(jnp.float32) + bias_BHQS[:, :, None], axis=-1)


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """Settings of attention, the same in every block of a model.

    Attributes:
      num_heads: H.
      dropout: rate, on attention weights and on each sublayer's output.
      max_distance: entries of the learned bias for each distance; 0: no such bias.
      bias: whether queries, keys and values have a bias.
      scale: logits are divided by sqrt(K) ('head', eq. 14) or by sqrt(D) ('model', eq. 3).
      dtype: of activations.
    """

    num_heads: int
    dropout: float = 0.0
    max_distance: int = 0
    bias: bool = True
    scale: str = 'head'
    dtype: Any = jnp.float32

    def factor(self, width: int) -> float:
        """The factor of the logits in a model of this width."""
        return (width // self.num_heads if self.scale == 'head' else width) ** -0.5


class Attention(nn.Module):
    """Causal multi-head self-attention with an output projection (eqs. 2-4)."""

    settings: AttentionSettings

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, Array]:
        """The output, [B, L, D] or [B, 1, D] if `last`, and the weights [B, H, 1, Q, S]."""
        settings, width = self.settings, x_BLD.shape[-1]
        head_width = width // settings.num_heads
        shape_HDK = (settings.num_heads, width, head_width)
        if last:
            query_input_BQD, equation = x_BLD[:, -1:], 'BQD,HDK->BQHK'
            query_BQHK = project(self, 'query', shape_HDK, equation, query_input_BQD, settings)
            key_BSHK, value_BSHK = project_all(self, ('key', 'value'), shape_HDK, x_BLD, settings)
        else:
            query_BQHK, key_BSHK, value_BSHK = project_all(
                self, ('query', 'key', 'value'), shape_HDK, x_BLD, settings
            )
        mixed_BQHNK, weight_BHNQS = attend(
            query_BQHK[:, :, :, None],
            key_BSHK,
            value_BSHK,
            mask_BLL[:, -1:] if last else mask_BLL,
            relative_bias(self, x_BLD.shape[1], query_BQHK.shape[1], settings),
            settings.factor(width),
            functools.partial(Dropout(settings.dropout), train=train),
        )
        w_HKD = self.param('output', normal_init, (settings.num_heads, head_width, width))
        bias_D = self.param('output_bias', nn.initializers.zeros, (width,))
        mixed_BQHK = mixed_BQHNK[:, :, :, 0]
        out_BQD = jnp.einsum('BQHK,HKD->BQD', mixed_BQHK, w_HKD.astype(settings.dtype))
        return out_BQD + bias_D[None, None].astype(settings.dtype), weight_BHNQS


def project(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    equation: str,
    x: Array,
    settings: AttentionSettings,
) -> Array:
    """One einsum of x with a parameter of the module, plus a bias if the settings have one.

    The parameter's axes are heads first, D second to last, K last; the bias has the same axes
    without D.
    """
    kernel, bias = _projection(module, name, shape, settings)
    y = jnp.einsum(equation, x, kernel)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))


def project_all(
    module: nn.Module,
    names: Sequence[str],
    shape: tuple[int, int, int],
    x_BLD: Array,
    settings: AttentionSettings,
) -> Array:
    """Several projections of x by one product of matrices: y_PBLHK, P in the order of the names.

    It computes what `project` does for each name, with the same parameters. A GPU starts kernels
    for each product, in the forward and in the backward pass, so that one is faster than several.
    """
    kernels, biases = zip(*(_projection(module, name, shape, settings) for name in names))
    y_PBLHK = jnp.einsum('BLD,PHDK->PBLHK', x_BLD, jnp.stack(kernels))
    return y_PBLHK + jnp.stack(biases)[:, None, None] if settings.bias else y_PBLHK


def _projection(
    module: nn.Module, name: str, shape: tuple[int, ...], settings: AttentionSettings
) -> tuple[Array, Array | None]:
    """The kernel of a projection, and its bias if the settings have one, in their dtype."""
    kernel = module.param(name, normal_init, shape).astype(settings.dtype)
    if not settings.bias:
        return kernel, None
    bias_shape = (*shape[:-2], shape[-1])
    bias = module.param(f'{name}_bias', nn.initializers.zeros, bias_shape)
    return kernel, bias.astype(settings.dtype)


def relative_bias(
    module: nn.Module, length: int, num_queries: int, settings: AttentionSettings
) -> Array | None:
    """The module's learned bias by distance, for the last positions of a row; [H, Q, S] or None."""
    if not settings.max_distance:
        return None
    shape_HL = (settings.num_heads, settings.max_distance)
    bias_HQS = distance_bias(module.param('distance', nn.initializers.zeros, shape_HL), length)
    return bias_HQS[:, -num_queries:]


class FeedForward(nn.Module):
    """Two dense layers of inner width 4D with GELU between them (eq. 5).

    GELU is its tanh form; S3-Rec and RecBole use erf, which differs by at most 5e-4.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        width = x_BLD.shape[-1]
        inner = nn.Dense(4 * width, kernel_init=normal_init, dtype=self.dtype, name='up')
        outer = nn.Dense(width, kernel_init=normal_init, dtype=self.dtype, name='down')
        return outer(nn.gelu(inner(x_BLD)))


class Block(nn.Module):
    """A Transformer block with post-LayerNorm: LN(x + attention), then LN(h + feed-forward)."""

    settings: AttentionSettings

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The block's output, [B, L, D] or [B, 1, D] if `last`, and its attention weights."""
        dtype = self.settings.dtype
        drop = functools.partial(Dropout(self.settings.dropout), train=train)
        attention = Attention(self.settings, name='attention')
        mixed_BQD, weight_BHNQS = attention(x_BLD, mask_BLL, train=train, last=last)
        query_input_BQD = x_BLD[:, -1:] if last else x_BLD
        norm = nn.LayerNorm(dtype=dtype, name='attention_norm')
        h_BQD = norm(query_input_BQD + drop(mixed_BQD))
        feed_forward = FeedForward(dtype, name='feed_forward')
        norm = nn.LayerNorm(dtype=dtype, name='feed_forward_norm')
        return norm(h_BQD + drop(feed_forward(h_BQD))), {'attention_BHNQS': weight_BHNQS}
