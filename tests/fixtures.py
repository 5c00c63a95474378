"""Small inputs, small models and assertions that several test files share.

`run_fixtures` has what needs a run, a training step or a recommender, `device_fixtures` what needs
several devices, and `oracles` the slow reference implementations.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.data import eval_batches
from fame_jax.losses import LossOptions
from fame_jax.models import layers, registry
from fame_jax.models.fame import FAME

# The repository, and stored results of other programs.
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / 'tests' / 'golden'


def quick_jit(f, **options):
    """Compile with few optimizations a function that runs only a few times.

    Results are numpy arrays. Slicing a jax.Array compiles a program for each slice; slicing a numpy
    array does not.
    """
    fast = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    compiled = jax.jit(f, compiler_options=fast, **options)
    return lambda *arguments: jax.device_get(compiled(*arguments))


def run_python(code):
    """What a new process prints that runs an indented text as a program; it has to succeed."""
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_key(seed):
    """A key of the rbg implementation, which compiles faster than the default."""
    return jax.random.key(seed, impl='rbg')


def float64(tree):
    """Every leaf of a tree as a float64 numpy array."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def random_tree(shapes, seed=0, scale=0.5):
    """Random parameters, large enough that every term of an equation matters.

    LayerNorm scales are drawn around 1, all other parameters around 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == 'scale' else 0.0
        return jnp.asarray(center + scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_close(actual, expected, bound=1e-5):
    """Every difference is at most `bound` times the largest entry (or 1, if that is larger)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    bound *= max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def assert_all_close(actual, expected, bound=1e-5):
    """`assert_close` of each pair of arrays in two sequences."""
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, bound)


# Rows and batches.

# Segments by row length: one history; several histories; histories and padding; and padding before
# one history, as in serving.
ROWS = {
    1: [[1], [1]],
    2: [[1, 1], [1, 2], [0, 1]],
    5: [[1, 1, 1, 1, 1], [1, 2, 2, 2, 3], [1, 1, 2, 0, 0], [0, 0, 1, 1, 1]],
}


def rows(length, num_items=12, seed=0):
    """Tokens, positions and segments [B, L] of ROWS[length], with random items."""
    segments_BL = np.array(ROWS[length], np.int32)
    positions_BL = np.zeros_like(segments_BL)
    for b in range(len(segments_BL)):
        for i in range(1, length):
            if segments_BL[b, i] and segments_BL[b, i] == segments_BL[b, i - 1]:
                positions_BL[b, i] = positions_BL[b, i - 1] + 1
    drawn_BL = np.random.default_rng(seed).integers(1, num_items + 1, segments_BL.shape)
    return np.where(segments_BL > 0, drawn_BL, 0).astype(np.int32), positions_BL, segments_BL


# Histories 1 2 3 4 5, 6 7 3 and 8 1, placed in rows in three ways: packed into one row, each in
# its own row, and each at the end of its own row.
PACKED = {
    'tokens': [[1, 2, 3, 4, 6, 7, 8, 0], [0] * 8, [0] * 8],
    'positions': [[0, 1, 2, 3, 0, 1, 0, 0], [0] * 8, [0] * 8],
    'segments': [[1, 1, 1, 1, 2, 2, 3, 0], [0] * 8, [0] * 8],
    'targets': [[2, 3, 4, 5, 7, 3, 1, 0], [0] * 8, [0] * 8],
}

ALONE = {
    'tokens': [[1, 2, 3, 4, 0, 0, 0, 0], [6, 7, 0, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]],
    'positions': [[0, 1, 2, 3, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8],
    'segments': [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
    'targets': [[2, 3, 4, 5, 0, 0, 0, 0], [7, 3, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
}

AT_THE_END = {name: [row[4:] + row[:4] for row in ALONE[name]] for name in ALONE}
AT_THE_END['segments'] = [[0, 0, 0, 0, *row[4:]] for row in AT_THE_END['segments']]


def make_batch(fields):
    """A Batch of hand-written rows, with weight 1 wherever there is a target."""
    fields = [np.array(fields[name], np.int32) for name in PACKED]
    return Batch(*fields, (fields[-1] > 0).astype(np.float32))


BATCH = make_batch(PACKED)


def right_aligned(history, length=7):
    """One history at the end of a row [1, L]."""
    row = [0] * (length - len(history)) + list(history)
    return np.array([row], np.int32)


# Models.


# Options of small models; each model takes those that it has.
SMALL = {'width': 8, 'num_heads': 2, 'num_experts': 3, 'num_blocks': 1, 'max_length': 6}
SMALL |= {'dropout': 0.0, 'item_dropout': 0.0, 'branches': 2}


def make_model(name, seed=0, **options):
    """A small model over 12 items, and parameters large enough that every part of it matters.

    `name` is a name of the registry or a class.
    """
    cls = registry.MODELS.get(name, name)
    small = {option: value for option, value in SMALL.items() if option in registry.options(cls)}
    module = cls(**{'num_items': 12, **small, **options})
    return module, random_tree(parameter_shapes(module), seed)


def make_fame_block(length, seed=0, **options):
    """FAME's block of width 8 with random parameters, inputs for ROWS[length], and the model."""
    model = FAME(**SMALL_BLOCK | options)
    block = model.block(model.num_blocks - 1)
    segments_BL = np.array(ROWS[length], np.int32)
    x_BLD = np.random.default_rng(seed).normal(size=(*segments_BL.shape, 8)).astype(np.float32)
    mask_BLL = layers.attention_mask(segments_BL)
    shapes = jax.eval_shape(
        lambda: block.init(new_key(0), x_BLD, mask_BLL, train=False, last=False)
    )
    return block, random_tree(shapes, seed), x_BLD, mask_BLL, segments_BL, model


SMALL_BLOCK = {'width': 8, 'num_heads': 2, 'num_experts': 3, 'max_length': 3, 'dropout': 0.0}


@cache
def parameter_shapes(module):
    """Shapes and dtypes of a module's parameters; traced once for each module."""
    return jax.eval_shape(partial(registry.init_params, module), new_key(0))


def count_parameters(module):
    """The number of parameters of a module."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(module)))


def encode(module, params, *fields, **options):
    """The compiled model's output; a model with static options is traced once for each shape."""
    if 'rngs' in options:
        return quick_jit(partial(module.apply, **options))({'params': params}, *fields)
    return _compiled(module, tuple(options.items()))({'params': params}, *fields)


@cache
def _compiled(module, options):
    return quick_jit(partial(module.apply, **dict(options)))


def hidden_states(module, params, fields):
    """Hidden states before `comparable`: float64 [B L, D]."""
    h_BLD, _ = encode(module, params, *fields, method='encode')
    return float64(h_BLD).reshape(-1, module.width)


def dependencies(module, params, tokens_BL, positions_BL, segments_BL):
    """The items that each position's query depends on: bool [B, L, V + 1], from the gradient."""
    direction_D = np.random.default_rng(3).normal(size=module.width).astype(np.float32)

    def outputs(item_table):
        tree = {'params': params | {'item_table': item_table}}
        return module.apply(tree, tokens_BL, positions_BL, segments_BL)[0] @ direction_D

    slope_BLVD = quick_jit(jax.jacrev(outputs))(params['item_table'])
    return np.abs(slope_BLVD).max(axis=-1) > 0


def loss_and_gradient(module):
    """(params, batch) -> (summed cross-entropy, its gradient), without dropout."""

    def loss(params, batch):
        query_BLD, item_VD, _ = module.apply({'params': params}, *batch[:3], method='forward')
        return losses.cross_entropy(
            query_BLD.reshape(-1, query_BLD.shape[-1]),
            item_VD,
            batch.targets_BL.reshape(-1),
            batch.weights_BL.reshape(-1),
        )[0]

    return quick_jit(jax.value_and_grad(loss))


def assert_depends_on_prefix_alone(module, params):
    """Each position's query depends on the items of its own history up to that position only.

    One row packs two histories and one ends with a history after padding. All items are distinct,
    so that an item identifies a position.
    """
    tokens_BL = np.array([[1, 2, 3, 4, 5, 0], [0, 0, 6, 7, 8, 9]], np.int32)
    segments_BL = np.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]], np.int32)
    positions_BL = np.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]], np.int32)
    prefixes = {
        (0, 0): [1],
        (0, 1): [1, 2],
        (0, 2): [1, 2, 3],
        (0, 3): [4],
        (0, 4): [4, 5],
        (1, 2): [6],
        (1, 3): [6, 7],
        (1, 4): [6, 7, 8],
        (1, 5): [6, 7, 8, 9],
    }
    depends_BLV = dependencies(module, params, tokens_BL, positions_BL, segments_BL)
    for place, prefix in prefixes.items():
        assert np.flatnonzero(depends_BLV[place]).tolist() == prefix


def assert_packing_changes_nothing(module, params, idle):
    """Loss and gradients are the same for every placement of the histories in rows.

    `idle` names the leaves whose gradient is 0.
    """
    f = loss_and_gradient(module)
    loss, gradient = f(params, make_batch(ALONE))
    for fields in (PACKED, AT_THE_END):
        other_loss, other_gradient = f(params, make_batch(fields))
        assert_close(other_loss, loss)
        jax.tree.map(assert_close, other_gradient, gradient)
    assert not np.any(gradient['item_table'][0])
    largest = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: abs(x).max(), gradient))
    without = {jax.tree_util.keystr(p, simple=True, separator='/') for p, g in largest if g < 1e-5}
    assert without == idle


# Objectives and losses.


def compile_objective(module, **options):
    """(params, batch, key) -> (sum, weight, metrics), with the loss options given."""
    loss = LossOptions(**{'chunk_tokens': 0, **options})
    return quick_jit(lambda params, batch, key: module.objective(params, batch, key, loss))


def compile_gradient(module, **options):
    """(params, batch, key) -> ((sum, weight), gradient), with the loss options given."""
    loss = LossOptions(**{'chunk_tokens': 0, **options})

    def total(params, batch, key):
        total, weight, _ = module.objective(params, batch, key, loss)
        return total, weight

    return quick_jit(jax.value_and_grad(total, has_aux=True))


def make_loss_inputs(tokens, items, width=8, seed=0, scale=1.0):
    """Random queries, item vectors, targets and weights; a target of weight 0 is 0."""
    rng = np.random.default_rng(seed)
    query_TD = (scale * rng.normal(size=(tokens, width))).astype(np.float32)
    item_VD = rng.normal(size=(items + 1, width)).astype(np.float32)
    target_T = rng.integers(1, items + 1, tokens).astype(np.int32)
    weight_T = rng.choice([0.0, 0.5, 1.0], tokens, p=[0.2, 0.2, 0.6]).astype(np.float32)
    return query_TD, item_VD, np.where(weight_T > 0, target_T, 0), weight_T


def make_negatives(tokens, items, negatives, seed=1):
    """Random negatives and weights [T, R]; a negative of weight 0 is 0."""
    rng = np.random.default_rng(seed)
    valid_TR = (rng.uniform(size=(tokens, negatives)) < 0.6).astype(np.float32)
    negative_TR = rng.integers(1, items + 1, valid_TR.shape)
    return np.where(valid_TR > 0, negative_TR, 0), valid_TR


@cache
def chunked(chunk_tokens, chunk_items):
    """Cross-entropy in chunks; cached, so that tests of one shape share one compilation."""
    return partial(losses.cross_entropy, chunk_tokens=chunk_tokens, chunk_items=chunk_items)


@cache
def loss_gradient(loss, compiled=True):
    """The gradient by queries and item vectors; compiled once for each loss and shape."""
    f = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(f) if compiled else f


def value_and_grads(loss, *args, compiled=True):
    """(sum, count, gradient by the queries, gradient by the item vectors)."""
    (total, count), grads = loss_gradient(loss, compiled)(*map(jnp.asarray, args))
    return total, count, *grads


# Evaluation.


def make_eval_batches(histories, targets, max_length=8, users=2):
    """EvalBatches of so many users, from lists of item ids."""
    items = np.array([item for history in histories for item in history], np.int32)
    offsets = np.cumsum([0, *map(len, histories)], dtype=np.int64)
    bounds = offsets[:-1], offsets[1:]
    return eval_batches.EvalBatches(items, *bounds, np.array(targets), max_length, users)


# Texts.

# A tiny BERT's config.json.
BERT_SETTINGS = {
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

# Hidden states and text vectors from torch and transformers for `make_bert_tensors`.
TINY_BERT = GOLDEN / 'tiny_bert.npz'


def make_bert_tensors(settings=BERT_SETTINGS, seed=0):
    """A random checkpoint with the tensor names of transformers' BertModel.

    Its values are large enough that every tensor matters.
    """
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


def make_text_model(folder):
    """A sentence encoder's folder, as sentence-transformers saves it, with 60 tokens."""
    import pytest

    safetensors = pytest.importorskip('safetensors.numpy')
    tokenizers = pytest.importorskip('tokenizers')
    letters = 'abceilnorstuy'
    tokens = [
        *('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'nail', 'polish', 'toy', 'story', 'lego'),
        *(
            'the',
            'of',
            'and',
            'amp',
            *'&;中文🎉.()',
            *letters,
            *(f'##{c}' for c in letters),
            *'0159',
        ),
    ]
    assert len(tokens) <= BERT_SETTINGS['vocab_size']
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    # Published tokenizers have lengths of their own, which the folder's settings override.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    (folder / '1_Pooling').mkdir(parents=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    safetensors.save_file(make_bert_tensors(), str(folder / 'model.safetensors'))
    modules = {'': 'Transformer', '1_Pooling': 'Pooling', '2_Normalize': 'Normalize'}
    special = {f'{name}_token': f'[{name.upper()}]' for name in ('pad', 'unk', 'cls', 'sep')}
    for name, value in {
        'config.json': BERT_SETTINGS,
        'modules.json': [
            {'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{kind}'}
            for i, (path, kind) in enumerate(modules.items())
        ],
        'sentence_bert_config.json': {'max_seq_length': 16},
        '1_Pooling/config.json': {
            'word_embedding_dimension': 16,
            'pooling_mode_mean_tokens': True,
        },
        'tokenizer_config.json': {'tokenizer_class': 'PreTrainedTokenizerFast', **special},
    }.items():
        (folder / name).write_text(json.dumps(value), encoding='utf-8')
    return folder


# HTML pages.

# HTML elements without an end tag.
VOID = {'meta', 'br', 'img', 'link', 'hr', 'input'}


class Reader(HTMLParser):
    """The tags, texts and attributes of an HTML page, and in `faults` every unbalanced tag."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.tags, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def sections(source):
    """The ids of a page's sections."""
    return re.findall('<section id="([a-z]+)">', source)
