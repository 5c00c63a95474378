"""BERT (Devlin et al., NAACL 2019, arXiv 1810.04805), frozen: tokens of a text in, its vector out.

The form that the text models of sentence-transformers have, all-MiniLM-L6-v2 among them: post-
LayerNorm blocks, GELU by erf, learned absolute positions, mean pooling. Nothing here is trained.
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

# What config.json calls the fields of the module.
FIELDS = {
    'vocabulary': 'vocab_size',
    'max_positions': 'max_position_embeddings',
    'num_types': 'type_vocab_size',
    'width': 'hidden_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'inner_width': 'intermediate_size',
}
# What else config.json may say that changes the vectors, and what it has to say. Where it is
# silent, the first value is meant.
FIXED = {
    'hidden_act': ('gelu',),
    'position_embedding_type': ('absolute', None),
    'is_decoder': (False,),
    'add_cross_attention': (False,),
}
# Tensors of a checkpoint that the vectors of a text do not depend on.
IDLE = ('pooler.', 'cls.', 'embeddings.position_ids')

# Parts of a block in the module and in a checkpoint.
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
    """A block: LN(x + attention), then LN(. + feed-forward); every token looks at every other."""

    num_heads: int
    inner_width: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array) -> Array:
        """[B, L, D] -> [B, L, D]; the mask is True where there is a token."""
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
    """The encoder: the sum of word, position and type vectors, LayerNorm, and the blocks."""

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
        """Encodes texts of one segment each.

        Args:
          tokens_BL: int32, from 0 to the vocabulary's size; L at most `max_positions`.
          mask_BL: bool, True where there is a token; what stands elsewhere changes nothing.

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
    """LayerNorm with the variance in two passes: in one, vectors are off by more than 1e-6."""
    return nn.LayerNorm(module.epsilon, dtype=module.dtype, use_fast_variance=False, name=name)


def pool(hidden_BLD: Array, mask_BL: Array, normalize: bool) -> Array:
    """The mean over a text's tokens, of unit length if `normalize`: float32 [B, D].

    A row without tokens gives zeros. The bounds are those of sentence-transformers.
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
      settings: what stands in config.json.
      place: what messages call the file.

    Raises:
      UserError: when it describes another architecture; names every difference.
    """
    kind = settings.get('model_type')
    if kind != 'bert':
        raise UserError(f'{place}: model_type is {kind!r}, and only "bert" can be read')
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
        raise UserError(f'{place}: not a BERT that can be read: {"; ".join(faults)}')
    return Bert(**values, epsilon=epsilon)


def names(num_layers: int) -> dict[str, str]:
    """Path in the module's tree, joined by '/', to the tensor's name in a checkpoint."""
    found = {
        'word': 'embeddings.word_embeddings.weight',
        'position': 'embeddings.position_embeddings.weight',
        'type': 'embeddings.token_type_embeddings.weight',
        'embedding_norm/scale': 'embeddings.LayerNorm.weight',
        'embedding_norm/bias': 'embeddings.LayerNorm.bias',
    }
    for i in range(num_layers):
        for parts, weight in ((DENSE, 'kernel'), (NORMS, 'scale')):
            for part, name in parts.items():
                found[f'layer_{i}/{part}/{weight}'] = f'encoder.layer.{i}.{name}.weight'
                found[f'layer_{i}/{part}/bias'] = f'encoder.layer.{i}.{name}.bias'
    return found


def parameters(tensors: Mapping[str, np.ndarray], module: Bert, place: str) -> dict[str, Any]:
    """The module's tree from a checkpoint's tensors, as float32.

    Args:
      tensors: arrays by the names of Hugging Face's BertModel, with or without 'bert.' before.
      module: what the tree is for.
      place: what messages call the checkpoint.

    Raises:
      UserError: when tensors are missing, of another shape, or without a use.
    """
    tensors = {name.removeprefix('bert.'): tensor for name, tensor in tensors.items()}
    blank_BL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), blank_BL, blank_BL)['params']
    shapes = flax.traverse_util.flatten_dict(shapes, sep='/')
    result, missing, unfit = {}, [], []
    used = names(module.num_layers)
    for path, name in used.items():
        if name not in tensors:
            missing.append(name)
            continue
        # A checkpoint keeps [out, in], the module [in, out].
        tensor = tensors[name].T if path.endswith('kernel') else tensors[name]
        if tensor.shape != shapes[path].shape:
            wanted = shapes[path].shape[:: -1 if path.endswith('kernel') else 1]
            unfit.append(f'{name} {tensors[name].shape} and not {wanted}')
        result[path] = np.ascontiguousarray(tensor, np.float32)
    left = [name for name in sorted(set(tensors) - set(used.values())) if not name.startswith(IDLE)]
    faults = {'missing': missing, 'of another shape': unfit, 'without a use': left}
    if any(faults.values()):
        told = '; '.join(f'{what}: {_some(which)}' for what, which in faults.items() if which)
        raise UserError(f'{place}: these are not the tensors that config.json tells of; {told}')
    return flax.traverse_util.unflatten_dict(result, sep='/')


def _some(faults: list[str], most: int = 3) -> str:
    rest = f' and {len(faults) - most} more' if len(faults) > most else ''
    return ', '.join(faults[:most]) + rest
