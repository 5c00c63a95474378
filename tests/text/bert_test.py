"""BERT against the hidden states of transformers, and refused checkpoints.

`golden/tiny_bert.npz` has the hidden states that torch and transformers give for
`make_bert_tensors`.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import BERT_SETTINGS, TINY_BERT, make_bert_tensors, quick_jit

from fame_jax.errors import UserError
from fame_jax.text import bert

# Texts of 6, 3 and 1 tokens, padded.
TOKENS_BL = np.array([[1, 2, 3, 4, 5, 59], [7, 8, 9, 0, 0, 0], [11, 0, 0, 0, 0, 0]], np.int32)
MASK_BL = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)

MODULE = bert.from_settings(BERT_SETTINGS, 'config.json')
APPLY = quick_jit(lambda params, *arguments: MODULE.apply({'params': params}, *arguments))


def hidden(tensors=None, tokens_BL=TOKENS_BL):
    params = bert.convert_params(tensors or make_bert_tensors(), MODULE, 'weights')
    return APPLY(params, tokens_BL, MASK_BL)


def test_hidden_states_equal_those_of_transformers():
    with np.load(TINY_BERT) as golden:
        expected_BLD = golden['hidden_BLD']
    assert np.abs(expected_BLD).max() > 1
    np.testing.assert_allclose(hidden()[MASK_BL], expected_BLD[MASK_BL], rtol=0, atol=1e-5)


def test_padding_has_no_effect():
    other = hidden(tokens_BL=np.where(MASK_BL, TOKENS_BL, 33))
    np.testing.assert_allclose(other[MASK_BL], hidden()[MASK_BL], rtol=0, atol=1e-6)
    assert np.abs(other - hidden()).max() > 0.1


def test_every_parameter_has_a_tensor_of_its_own():
    names = bert.checkpoint_names(2)
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == set(make_bert_tensors())


def test_pooling_by_hand():
    hidden_BLD = np.array([[[3.0, 0], [0, 8], [9, 9]], [[5, 5], [5, 5], [5, 5]]], np.float32)
    mask_BL = np.array([[1, 1, 0], [0, 0, 0]], bool)
    assert bert.pool(hidden_BLD, mask_BL, False).tolist() == [[1.5, 4], [0, 0]]
    length = (1.5**2 + 4**2) ** 0.5
    expected = [[1.5 / length, 4 / length], [0, 0]]
    np.testing.assert_allclose(bert.pool(hidden_BLD, mask_BL, True), expected, atol=1e-7)


def test_checkpoints_with_a_prefix_a_pooler_or_half_precision():
    tensors = {f'bert.{name}': tensor for name, tensor in make_bert_tensors().items()}
    unused = ('bert.pooler.dense.weight', 'cls.predictions.bias', 'bert.embeddings.position_ids')
    np.testing.assert_array_equal(hidden(tensors | {n: np.ones(3) for n in unused}), hidden())
    half = {name: tensor.astype(np.float16) for name, tensor in make_bert_tensors().items()}
    actual = hidden(half)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual[MASK_BL], hidden()[MASK_BL], atol=0.02)


def test_the_dtype_of_the_computation():
    module = MODULE.clone(dtype=jnp.bfloat16)
    params = bert.convert_params(make_bert_tensors(), module, 'weights')
    actual = quick_jit(module.apply)({'params': params}, TOKENS_BL, MASK_BL)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(np.float32)[MASK_BL], hidden()[MASK_BL], atol=0.2)


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
        bert.from_settings({**BERT_SETTINGS, **change}, 'm/config.json')
    assert words in str(error.value) and '\n' not in str(error.value)


def refusal(tensors):
    with pytest.raises(UserError, match=r'^m/model.safetensors: ') as error:
        bert.convert_params(tensors, MODULE, 'm/model.safetensors')
    assert '\n' not in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit_are_named():
    tensors = make_bert_tensors()
    del tensors['encoder.layer.1.output.dense.bias']
    assert 'missing: encoder.layer.1.output.dense.bias' in refusal(tensors)
    tensors = make_bert_tensors() | {'encoder.layer.0.intermediate.dense.weight': np.ones((20, 16))}
    assert 'intermediate.dense.weight (20, 16) and not (24, 16)' in refusal(tensors)
    # If additional layers were ignored, the vectors would be wrong without an error.
    deeper = make_bert_tensors({**BERT_SETTINGS, 'num_hidden_layers': 3})
    assert 'unknown: encoder.layer.2.' in refusal(deeper) and ' more' in refusal(deeper)
