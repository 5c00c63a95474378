"""BERT against transformers' own hidden states, and what it refuses.

`golden/tiny_bert.npz` holds what torch and transformers gave for `tiny_tensors`, computed once;
`encoder_test` has the texts. Where sentence_transformers is installed, it is asked again there.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from layers_test import quick_jit

from fame_jax.errors import UserError
from fame_jax.models import bert

GOLDEN = Path(__file__).parent / 'golden' / 'tiny_bert.npz'

SETTINGS = {
    'architectures': ['BertModel'],
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'vocab_size': 60,
    'max_position_embeddings': 32,
    'type_vocab_size': 2,
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 24,
    'layer_norm_eps': 1e-12,
}
# Texts of 6, 3 and 1 tokens, and what stands behind them.
TOKENS_BL = np.array([[1, 2, 3, 4, 5, 59], [7, 8, 9, 0, 0, 0], [11, 0, 0, 0, 0, 0]], np.int32)
MASK_BL = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)


def tiny_tensors(settings=SETTINGS, seed=0):
    """A checkpoint by the names that transformers gives its BertModel, so large that all shows."""
    width, inner = settings['hidden_size'], settings['intermediate_size']
    shapes = {
        'embeddings.word_embeddings.weight': (settings['vocab_size'], width),
        'embeddings.position_embeddings.weight': (settings['max_position_embeddings'], width),
        'embeddings.token_type_embeddings.weight': (settings['type_vocab_size'], width),
        'embeddings.LayerNorm.weight': (width,),
        'embeddings.LayerNorm.bias': (width,),
    }
    for i in range(settings['num_hidden_layers']):
        layer = {
            'attention.self.query': (width, width),
            'attention.self.key': (width, width),
            'attention.self.value': (width, width),
            'attention.output.dense': (width, width),
            'attention.output.LayerNorm': (width,),
            'intermediate.dense': (inner, width),
            'output.dense': (width, inner),
            'output.LayerNorm': (width,),
        }
        for name, shape in layer.items():
            shapes[f'encoder.layer.{i}.{name}.weight'] = shape
            shapes[f'encoder.layer.{i}.{name}.bias'] = shape[:1]
    rng = np.random.default_rng(seed)
    return {
        name: ('LayerNorm.weight' in name) + 0.4 * rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


MODULE = bert.from_settings(SETTINGS, 'config.json')
APPLY = quick_jit(lambda params, *arguments: MODULE.apply({'params': params}, *arguments))


def hidden(tensors=None, tokens_BL=TOKENS_BL):
    params = bert.parameters(tensors or tiny_tensors(), MODULE, 'weights')
    return APPLY(params, tokens_BL, MASK_BL)


def test_hidden_states_are_those_of_transformers():
    with np.load(GOLDEN) as golden:
        expected_BLD = golden['hidden_BLD']
    assert np.abs(expected_BLD).max() > 1
    np.testing.assert_allclose(hidden()[MASK_BL], expected_BLD[MASK_BL], rtol=0, atol=1e-5)


def test_what_stands_behind_a_text_changes_nothing():
    other = hidden(tokens_BL=np.where(MASK_BL, TOKENS_BL, 33))
    np.testing.assert_allclose(other[MASK_BL], hidden()[MASK_BL], rtol=0, atol=1e-6)
    assert np.abs(other - hidden()).max() > 0.1


@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize('part', [*bert.DENSE.values(), *bert.NORMS.values()])
def test_every_tensor_has_its_place(layer, part):
    """No two paths read one tensor, and none is read as another: names are told one by one."""
    found = bert.names(2)
    assert len(set(found.values())) == len(found) == len(tiny_tensors())
    assert f'encoder.layer.{layer}.{part}.weight' in found.values()
    assert f'encoder.layer.{layer}.{part}.bias' in found.values()


def test_pooling_by_hand():
    hidden_BLD = np.array([[[3.0, 0], [0, 8], [9, 9]], [[5, 5], [5, 5], [5, 5]]], np.float32)
    mask_BL = np.array([[1, 1, 0], [0, 0, 0]], bool)
    assert bert.pool(hidden_BLD, mask_BL, False).tolist() == [[1.5, 4], [0, 0]]
    length = (1.5**2 + 4**2) ** 0.5
    expected = [[1.5 / length, 4 / length], [0, 0]]
    np.testing.assert_allclose(bert.pool(hidden_BLD, mask_BL, True), expected, atol=1e-7)


def test_checkpoints_of_a_larger_model_are_read_too():
    """With 'bert.' before, with a pooler and a head that texts do not need, and in half floats."""
    tensors = {f'bert.{name}': tensor for name, tensor in tiny_tensors().items()}
    idle = ('bert.pooler.dense.weight', 'cls.predictions.bias', 'bert.embeddings.position_ids')
    np.testing.assert_array_equal(hidden(tensors | {n: np.ones(3) for n in idle}), hidden())
    half = {name: tensor.astype(np.float16) for name, tensor in tiny_tensors().items()}
    found = hidden(half)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[MASK_BL], hidden()[MASK_BL], atol=0.02)


def test_computing_in_another_dtype():
    module = MODULE.clone(dtype=jnp.bfloat16)
    params = bert.parameters(tiny_tensors(), module, 'weights')
    found = quick_jit(module.apply)({'params': params}, TOKENS_BL, MASK_BL)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32)[MASK_BL], hidden()[MASK_BL], atol=0.2)


OTHERS = {
    'roberta': ({'model_type': 'roberta'}, "model_type is 'roberta'"),
    'tanh': ({'hidden_act': 'gelu_new'}, "hidden_act is 'gelu_new' and not 'gelu'"),
    'relative': ({'position_embedding_type': 'relative_key'}, 'position_embedding_type'),
    'decoder': ({'is_decoder': True}, 'is_decoder is True and not False'),
    'no layers': ({'num_hidden_layers': None}, 'num_hidden_layers is None'),
    'text for a size': ({'hidden_size': '16'}, "hidden_size is '16'"),
    'heads': ({'num_attention_heads': 3}, 'no multiple of num_attention_heads'),
    'epsilon': ({'layer_norm_eps': 'small'}, 'layer_norm_eps'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_architectures_are_refused(name):
    change, words = OTHERS[name]
    with pytest.raises(UserError, match=r'^m/config.json: ') as error:
        bert.from_settings({**SETTINGS, **change}, 'm/config.json')
    assert words in str(error.value) and '\n' not in str(error.value)


def test_all_differences_are_told_at_once():
    with pytest.raises(UserError) as error:
        bert.from_settings({'model_type': 'bert', 'hidden_act': 'relu'}, 'm')
    assert all(word in str(error.value) for word in ('hidden_act', 'vocab_size', 'hidden_size'))


def faulty(tensors):
    with pytest.raises(UserError, match=r'^m/model.safetensors: ') as error:
        bert.parameters(tensors, MODULE, 'm/model.safetensors')
    assert '\n' not in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit_are_named():
    tensors = tiny_tensors()
    del tensors['encoder.layer.1.output.dense.bias']
    assert 'missing: encoder.layer.1.output.dense.bias' in faulty(tensors)
    tensors = tiny_tensors() | {'encoder.layer.0.intermediate.dense.weight': np.ones((20, 16))}
    assert 'intermediate.dense.weight (20, 16) and not (24, 16)' in faulty(tensors)
    # More layers than config.json tells of would give other vectors in silence.
    deeper = tiny_tensors({**SETTINGS, 'num_hidden_layers': 3})
    assert 'without a use: encoder.layer.2.' in faulty(deeper) and ' more' in faulty(deeper)


def test_another_models_tensors_are_refused():
    told = faulty({'roberta.embeddings.word_embeddings.weight': np.ones((60, 16))})
    assert 'missing: embeddings.word_embeddings.weight' in told
    assert 'without a use: roberta.' in told
