"""BERT (Devlin et al., NAACL 2019, arXiv 1810.04805), frozen: token ids to a text's vector.

The architecture is that of many models of sentence-transformers, such as all-MiniLM-L6-v2:
post-LayerNorm blocks, exact GELU (erf), learned absolute positions, mean pooling.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.errors import UserError
from fame_jax.models import layers

Array = jax.Array

# Field of the module -> its name in config.json.
FIELDS = {
    'vocabulary': 'vocab_size',
    'max_positions': 'max_position_embeddings',
    'num_types': 'type_vocab_size',
    'width': 'hidden_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'inner_width': 'intermediate_size',
}
# Other settings in config.json that change the vectors -> their supported values; the first is the
# default.
FIXED = {
    'hidden_act': ('gelu',),
    'position_embedding_type': ('absolute', None),
    'is_decoder': (False,),
    'add_cross_attention': (False,),
}
# Prefixes of tensors in a checkpoint that the hidden states do not depend on.
UNUSED = ('pooler.', 'cls.', 'embeddings.position_ids')

# Parts of a block: name in the module -> name in a checkpoint.
DENSE = {
    'query': 'attention.self.query',
    'key': 'attention.self.key',
    'value': 'attention.self.value',
    'output': 'attention.output.dense',
    'up': 'intermediate.dense',
    'down': 'output.dense',
}
NORMS = {'attention_norm': 'attention.output.LayerNorm', 'feed_forward_norm': 'output.LayerNorm'}


class Layer(nn.Module):
    """A block: h = LN(x + attention(x)), then LN(h + feed-forward(h)), without a causal mask."""

    num_heads: int
    inner_width: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array) -> Array:
        """[B, L, D] -> [B, L, D]; mask_BL is bool, True for tokens and False for padding."""
        rows, length, width = x_BLD.shape
        head_width = width // self.num_heads
        shape_BLHK = (rows, length, self.num_heads, head_width)
        query_BLHK, key_BLHK, value_BLHK = (
            nn.Dense(width, dtype=self.dtype, name=name)(x_BLD).reshape(shape_BLHK)
            for name in ('query', 'key', 'value')
        )
        mixed_BLHNK, _ = layers.attend(
            query_BLHK[:, :, :, None],
            key_BLHK,
            value_BLHK,
            mask_BL[:, None],
            None,
            head_width**-0.5,
            lambda weight_BHNQS: weight_BHNQS,
        )
        mixed_BLD = mixed_BLHNK.reshape(x_BLD.shape)
        mixed_BLD = nn.Dense(width, dtype=self.dtype, name='output')(mixed_BLD)
        h_BLD = norm(self, 'attention_norm')(x_BLD + mixed_BLD)
        up = nn.Dense(self.inner_width, dtype=self.dtype, name='up')
        inner = nn.gelu(up(h_BLD), approximate=False)
        down_BLD = nn.Dense(width, dtype=self.dtype, name='down')(inner)
        return norm(self, 'feed_forward_norm')(h_BLD + down_BLD)


class Bert(nn.Module):
    """The encoder: word, position and type vectors are added, then come LayerNorm and the blocks.

    Fields:
      vocabulary: number of token ids.
      max_positions: the largest L.
      num_types: rows of the type table, of which row 0 is used.
      width: D.
      num_layers: blocks.
      num_heads: attention heads of a block.
      inner_width: hidden units of the feed-forward layers.
      epsilon: of LayerNorm.
      dtype: of the computation.
    """

    vocabulary: int
    max_positions: int
    num_types: int
    width: int
    num_layers: int
    num_heads: int
    inner_width: int
    epsilon: float = 1e-12
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_BL: Array, mask_BL: Array) -> Array:
        """Encodes texts, one in each row.

        Args:
          tokens_BL: int32 in [0, vocabulary); L is at most `max_positions`.
          mask_BL: bool, True for tokens; the values at other positions have no effect on them.

        Returns:
          hidden_BLD: the last block's output, of `dtype`.
        """
        init = layers.normal_init
        word_VD = self.param('word', init, (self.vocabulary, self.width))
        position_LD = self.param('position', init, (self.max_positions, self.width))
        type_SD = self.param('type', init, (self.num_types, self.width))
        x_BLD = word_VD[tokens_BL] + type_SD[0][None, None]
        x_BLD += position_LD[None, : tokens_BL.shape[1]]
        x_BLD = norm(self, 'embedding_norm')(x_BLD.astype(self.dtype))
        for i in range(self.num_layers):
            layer = Layer(
                self.num_heads, self.inner_width, self.epsilon, self.dtype, name=f'layer_{i}'
            )
            x_BLD = layer(x_BLD, mask_BL)
        return x_BLD


def norm(module: Bert | Layer, name: str) -> nn.LayerNorm:
    """LayerNorm, with the variance in two passes; one pass changes vectors by more than 1e-6."""
    return nn.LayerNorm(module.epsilon, dtype=module.dtype, use_fast_variance=False, name=name)


def pool(hidden_BLD: Array, mask_BL: Array, normalize: bool) -> Array:
    """The mean over a text's tokens, float32 [B, D], of unit length if `normalize`.

    A row without tokens gives zeros. The bounds on the divisors are those of sentence-transformers.
    """
    weight_BL = mask_BL.astype(jnp.float32)
    sum_BD = jnp.einsum('BLD,BL->BD', hidden_BLD.astype(jnp.float32), weight_BL)
    mean_BD = sum_BD / jnp.maximum(weight_BL.sum(axis=1, keepdims=True), 1e-9)
    if not normalize:
        return mean_BD
    length_B1 = jnp.linalg.norm(mean_BD, axis=1, keepdims=True)
    return mean_BD / jnp.maximum(length_B1, 1e-12)


def from_settings(settings: Mapping[str, Any], place: str) -> Bert:
    """The module that a model's config.json describes.

    Args:
      settings: the content of config.json.
      place: the file's name in messages.

    Raises:
      UserError: when the architecture is not supported; the message has every difference.
    """
    kind = settings.get('model_type')
    if kind != 'bert':
        raise UserError(
            f"{place}: model_type is {kind!r}, and only 'bert' is supported; choose another model"
        )
    faults = [
        f'{name} is {settings[name]!r} and not {allowed[0]!r}'
        for name, allowed in FIXED.items()
        if settings.get(name, allowed[0]) not in allowed
    ]
    values = {field: settings.get(name) for field, name in FIELDS.items()}
    faults += [
        f'{FIELDS[field]} is {value!r} and not a whole number above 0'
        for field, value in values.items()
        if type(value) is not int or value < 1
    ]
    epsilon = settings.get('layer_norm_eps', 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        faults.append(f'layer_norm_eps is {epsilon!r} and not between 0 and 1')
    if not faults and values['width'] % values['num_heads']:
        faults.append('hidden_size is no multiple of num_attention_heads')
    if faults:
        raise UserError(f'{place}: this BERT is not supported, choose another: {"; ".join(faults)}')
    return Bert(**values, epsilon=epsilon)


def checkpoint_names(num_layers: int) -> dict[str, str]:
    """Path of a parameter in the module's tree, joined by '/' -> its name in a checkpoint."""
    result = {
        'word': 'embeddings.word_embeddings.weight',
        'position': 'embeddings.position_embeddings.weight',
        'type': 'embeddings.token_type_embeddings.weight',
        'embedding_norm/scale': 'embeddings.LayerNorm.weight',
        'embedding_norm/bias': 'embeddings.LayerNorm.bias',
    }
    for i in range(num_layers):
        for parts, weight in ((DENSE, 'kernel'), (NORMS, 'scale')):
            for part, name in parts.items():
                result[f'layer_{i}/{part}/{weight}'] = f'encoder.layer.{i}.{name}.weight'
                result[f'layer_{i}/{part}/bias'] = f'encoder.layer.{i}.{name}.bias'
    return result


def convert_params(tensors: Mapping[str, np.ndarray], module: Bert, place: str) -> dict[str, Any]:
    """Converts a checkpoint's tensors to the module's parameters, float32.

    Args:
      tensors: arrays under the names of Hugging Face's BertModel, with or without the prefix
        'bert.'.
      module: the encoder.
      place: the checkpoint's name in messages.

    Raises:
      UserError: when tensors are missing, have another shape, or belong to no parameter.
    """
    tensors = {name.removeprefix('bert.'): tensor for name, tensor in tensors.items()}
    blank_BL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), blank_BL, blank_BL)['params']
    shapes = flax.traverse_util.flatten_dict(shapes, sep='/')
    params, missing, wrong = {}, [], []
    used = checkpoint_names(module.num_layers)
    for path, name in used.items():
        if name not in tensors:
            missing.append(name)
            continue
        # Dense kernels are [out, in] in a checkpoint and [in, out] in the module.
        tensor = tensors[name].T if path.endswith('kernel') else tensors[name]
        if tensor.shape != shapes[path].shape:
            wanted = shapes[path].shape[:: -1 if path.endswith('kernel') else 1]
            wrong.append(f'{name} {tensors[name].shape} and not {wanted}')
        params[path] = np.ascontiguousarray(tensor, np.float32)
    rest = sorted(set(tensors) - set(used.values()))
    unknown = [name for name in rest if not name.startswith(UNUSED)]
    faults = {'missing': missing, 'of another shape': wrong, 'unknown': unknown}
    if any(faults.values()):
        listed = '; '.join(f'{fault}: {_some(which)}' for fault, which in faults.items() if which)
        raise UserError(
            f'{place}: the tensors do not fit config.json, copy both files again: {listed}'
        )
    return flax.traverse_util.unflatten_dict(params, sep='/')


def _some(faults: list[str], most: int = 3) -> str:
    rest = f' and {len(faults) - most} more' if len(faults) > most else ''
    return ', '.join(faults[:most]) + rest
