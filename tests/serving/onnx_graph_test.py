"""Converted programs against JAX, through the reference evaluator of onnx and ONNX Runtime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

onnx = pytest.importorskip('onnx')
reference = pytest.importorskip('onnx.reference')
from fame_jax.serving import onnx_graph  # noqa: E402

WIDTH = 6
W = np.random.default_rng(0).normal(size=(3, WIDTH, 4)).astype(np.float32)
TABLE = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)


def floats(x):
    return x.astype(jnp.float32) / 3 - 1


def half(x):
    """Numbers that have few digits, since the graph computes in float32."""
    return (x.astype(jnp.bfloat16) / 4) ** 2


def loop(x, reverse):
    def step(carry, column):
        carry = jnp.tanh(carry * 0.5 + column)
        return carry, carry * column

    last, columns = lax.scan(step, jnp.zeros(x.shape[0]), floats(x).T, reverse=reverse)
    return jnp.concatenate([last[:, None], columns.T], axis=1)


PROGRAMS = {
    'arithmetic': lambda x: (x * 2 + 1 - x // 3) % 5,
    'numbers': lambda x: jnp.exp(-floats(x)) / (1 + jnp.abs(floats(x))) ** 3 - jnp.sqrt(x + 1.0),
    'logarithms': lambda x: jnp.log1p(floats(x) ** 2) + jnp.log(x + 1.0) + (x + 1.0) ** -2,
    'powers': lambda x: (x + 1.0) ** 0.3 + lax.rsqrt(x + 2.0) + jnp.square(floats(x)),
    'activations': lambda x: (
        jax.nn.gelu(floats(x), approximate=False) + jax.nn.relu(floats(x)) + jax.nn.silu(floats(x))
    ),
    'softmax': lambda x: jax.nn.softmax(floats(x), axis=-1),
    'choices': lambda x: jnp.where(x > 4, x, -1) + jnp.clip(x, 2, 5) + jnp.minimum(x, 3),
    'truth': lambda x: jnp.where((x > 1) & ~(x > 5) | (x == 7), x < 3, x != 2),
    'finite': lambda x: jnp.isfinite(jnp.log(x.astype(jnp.float32))) & (jnp.sign(x - 2) < 1),
    'any and all': lambda x: jnp.stack([(x > 4).any(1), (x > 1).all(1)], axis=1),
    'extremes': lambda x: jnp.stack([x.max(1), x.min(1), x.prod(1) % 7, x.sum(1)], axis=1),
    'argmax with ties': lambda x: jnp.argmax(x // 3, axis=1)[:, None],
    'sort': lambda x: jnp.sort(floats(x), axis=1),
    'cumulated': lambda x: jnp.cumsum(x, axis=1) + lax.cumsum(x, axis=1, reverse=True),
    'mask of all pairs': lambda x: (x[:, None] == x[:, :, None]) & np.tri(WIDTH, dtype=bool)[None],
    'one product': lambda x: floats(x) @ W[0],
    'batched product': lambda x: jnp.einsum('BS,BQ,QK->BSK', floats(x), floats(x), W[1]),
    'a product for each head': lambda x: jnp.einsum('BD,HDK->BHK', floats(x), W),
    'a product over two axes': lambda x: jnp.einsum(
        'BHD,HDK->BK', x[:, None] * W[None, :, :, 0], W
    ),
    'a product of vectors': lambda x: jnp.einsum('BD,BD->B', floats(x), floats(x))[:, None],
    'rows of a table': lambda x: jnp.asarray(TABLE)[x],
    'columns of a table': lambda x: jnp.asarray(TABLE)[:, x % 5].transpose(1, 0, 2),
    'entries of a table': lambda x: jnp.asarray(TABLE)[x, x % 5],
    'a place in each row': lambda x: jnp.take_along_axis(x, x[:, :2] % WIDTH, axis=1),
    'outside of a row': lambda x: jnp.take_along_axis(floats(x), x[:, :3] + 3, axis=1),
    'rows of each row': lambda x: jnp.take_along_axis(
        floats(x)[:, :, None] * W[0][None], (x[:, :2] % WIDTH)[:, :, None], axis=1
    ),
    'parts': lambda x: jnp.concatenate([x[:, 3:], x[:, ::2], x[:, -1:], x[:, ::-1]], axis=1),
    'split': lambda x: jnp.stack(jnp.split(x, 3, axis=1)[::-1], axis=1),
    'a place that is set': lambda x: x.at[:, 2].set(9) + x.at[:, -1].set(x[:, 0]),
    'padding': lambda x: jnp.pad(x, ((0, 0), (2, 1)), constant_values=-7),
    'padding of truth': lambda x: jnp.pad(x > 3, ((0, 0), (1, 0)), constant_values=True),
    'padding that takes away': lambda x: lax.pad(x, 0, ((0, 0, 0), (-2, 1, 0))),
    'axes': lambda x: x[:, None].transpose(2, 0, 1).reshape(WIDTH, -1).T,
    'rows in one axis': lambda x: (x.reshape(-1, 2) @ np.ones((2, 3), int)).reshape(-1, 9),
    'a loop': lambda x: loop(x, False),
    'a loop from the end': lambda x: loop(x, True),
    'sixteen bits': half,
    'inner functions': lambda x: jax.checkpoint(jax.jit(lambda y: y * 2))(jax.nn.relu6(x * 1.0)),
    'the number of rows': lambda x: x + jnp.ones((2 * x.shape[0], 1)).sum() / x.shape[0],
    'constants alone': lambda x: jnp.broadcast_to(jnp.arange(4.0) ** 2, (x.shape[0], 4)),
    'the input itself': lambda x: x,
}


INPUT = np.random.default_rng(2).integers(0, 9, (5, WIDTH)).astype(np.int32)


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_converted_program_computes_the_same(name):
    def function(x):
        return PROGRAMS[name](x).astype(jnp.float32)

    model = onnx_graph.convert(function, WIDTH, 'x', 'y')
    session = None
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(model.SerializeToString())
    except ModuleNotFoundError:
        pass
    evaluator = reference.ReferenceEvaluator(model)
    expected = np.asarray(jax.jit(function)(INPUT))
    for rows in (5, 1):
        for run in (evaluator.run, *([session.run] if session else [])):
            (found,) = run(['y'], {'x': INPUT[:rows]})
            assert found.shape == expected[:rows].shape
            np.testing.assert_allclose(found, expected[:rows], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ('function', 'words'),
    [
        (lambda x: lax.while_loop(lambda y: jnp.any(y < 9), lambda y: y + 1, x), 'while'),
        (lambda x: lax.dynamic_slice(x, (0, x.sum()), (x.shape[0], 2)), 'place is computed'),
        (lambda x: lax.cbrt(floats(x)), 'cbrt'),
        (lambda x: x.astype(jnp.uint8), 'uint8'),
        (lambda x: x if x.shape[0] > 3 else -x, 'number of rows'),
        (lambda x: lax.pad(x, 0, ((0, 0, 0), (0, 0, 1))), 'padding between'),
        (lambda x: x.at[:, x.max()].set(1), 'scatter'),
        (lambda x: jnp.argsort(x), 'iota'),
    ],
)
def test_a_program_without_a_rule_is_refused_by_its_name(function, words):
    with pytest.raises(onnx_graph.NotConvertible, match=words) as refusal:
        onnx_graph.convert(function, WIDTH, 'x', 'y')
    assert '\n' not in str(refusal.value)


def test_equal_operations_and_constants_are_stored_once():
    def twice(x):
        return jnp.asarray(TABLE)[x] + jnp.asarray(TABLE.copy())[x]

    graph = onnx_graph.convert(twice, WIDTH, 'x', 'y').graph
    assert [node.op_type for node in graph.node].count('GatherND') == 1
    assert sum(list(tensor.dims) == [9, 5] for tensor in graph.initializer) == 1


def test_what_the_output_does_not_need_is_left_out():
    def function(x):
        _ = jnp.asarray(TABLE)[x]
        return x + np.tri(WIDTH, dtype=np.int32)[2][None]  # computed at once, from constants

    graph = onnx_graph.convert(function, WIDTH, 'x', 'y').graph
    assert [node.op_type for node in graph.node] == ['Add', 'Identity']
