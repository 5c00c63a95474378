"""Training steps on a mesh of eight devices are those of one device."""

import functools
import re

import jax
import numpy as np
import pytest
from device_fixtures import MESHES, collectives, on_eight

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import registry
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.training import step as step_lib
from fame_jax.training.optimizer import make_optimizer

OPTIONS = {'width': 8, 'num_blocks': 1, 'num_experts': 2, 'max_length': 6}
SHAPE = (8, 8)


def make_program(mesh, name='fame', num_items=45, chunk_items=0, all_terms=True):
    """The state at initialisation, and a program of blocks of two steps.

    With `all_terms`, FAME has all that a step can have: soft labels, weights of seen items, and
    a second loss over the catalogue, that of the heads.
    """
    known = registry.options(registry.find(name))
    options = {option: value for option, value in OPTIONS.items() if option in known}
    module = registry.make(name, options, num_items=num_items, mesh=mesh)
    init = functools.partial(registry.init_params, module)
    params = mesh_lib.init_sharded(init, mesh)(jax.random.key(0))
    optimizer = make_optimizer(1e-2)
    labels = {}
    if name == 'fame' and all_terms:
        module = module.clone(head_loss=0.3)
        labels = {'future_targets': (1.0, 0.5), 'seen_weight': 3.0}
    loss = LossOptions(chunk_tokens=5, chunk_items=chunk_items, **labels)
    step = step_lib.make_step(functools.partial(module.objective, loss=loss), optimizer)
    return step_lib.init_state(params, optimizer, mesh), step_lib.Program(step, 2, mesh)


def compile_block(state, program, num_items=45):
    """XLA's program of a block."""
    batch = make_batch(0, num_items)
    return program.precompile(state, batch, jax.random.key(1)).result()


def make_batch(seed, num_items=45):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(1, num_items + 1, (2, *SHAPE)).astype(np.int32)
    positions = np.broadcast_to(np.arange(SHAPE[1], dtype=np.int32) % 4, SHAPE).copy()
    segments = np.broadcast_to(1 + np.arange(SHAPE[1], dtype=np.int32) // 4, SHAPE).copy()
    weights = (rng.random(SHAPE) > 0.2).astype(np.float32)
    return Batch(tokens, positions, segments, targets, weights)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@on_eight
@pytest.mark.parametrize(
    'data, model', [(2, 4), *(slow(*mesh) for mesh in MESHES if mesh != (2, 4))]
)
def test_each_device_has_its_shard_of_the_tables(data, model):
    state, _ = make_program(mesh_lib.make_mesh(data, model))
    tables = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if 'item_table' in jax.tree_util.keystr(path)
    ]
    assert len(tables) == 3  # the table and its two moments of Adam
    rows = mesh_lib.table_rows(45, mesh_lib.make_mesh(data, model))
    for table in tables:
        assert table.shape == (rows, 8)
        assert {shard.data.shape for shard in table.addressable_shards} == {(rows // model, 8)}
    assert state.params['facet_block']['gate'].sharding.is_fully_replicated


@on_eight
@pytest.mark.parametrize(
    'name, data, model, chunk_items',
    [
        ('fame', 4, 2, 0),
        slow('fame', 2, 4, 5),
        *(slow('fame', *mesh, 0) for mesh in MESHES if mesh != (4, 2)),
        # One model of each kind of rows and of layers, since each case compiles for a minute.
        *(slow(name, 4, 2, 0) for name in ('gru4rec', 'cl4srec', 'hstu', 'bsarec')),
    ],
)
def test_steps_on_a_mesh_are_those_of_one_device(name, data, model, chunk_items):
    """From equal parameters, with dropout; padding rows past V start random and do not change."""
    one, program_one = make_program(None, name)
    mesh = mesh_lib.make_mesh(data, model)
    many, program_many = make_program(mesh, name, chunk_items=chunk_items)
    for seed in range(2):
        block = [make_batch(2 * seed), make_batch(2 * seed + 1)]
        one, sums_one = program_one(one, block, jax.random.key(1))
        many, sums_many = program_many(many, block, jax.random.key(1))
        assert sums_one.keys() == sums_many.keys() >= {'loss', 'weight'}
        for name_, sum_S in sums_one.items():
            np.testing.assert_allclose(sum_S, sums_many[name_], rtol=2e-5, atol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(one.params):
        other = functools.reduce(lambda tree, key: tree[key.key], path, many.params)
        np.testing.assert_allclose(leaf, np.asarray(other)[: len(leaf)], atol=2e-3, rtol=2e-3)


def collectives_in_loops(compiled):
    """The collectives inside loops of the sharded loss."""
    lines = re.findall(r'.* (?:all-reduce|all-gather)\(.*', compiled.as_text())
    return [line for line in lines if 'shard_map/while' in line]


@on_eight
@pytest.mark.parametrize(
    'data, model, chunk_items', [(4, 2, 300), slow(4, 2, 0), slow(1, 8, 0), slow(1, 8, 300)]
)
def test_a_step_sends_no_table(data, model, chunk_items):
    """A step's collectives by the size of what they send; a table of 20,001 rows would stand out.

    They send: embedded items together with target vectors; maxima and sums, of a chunk of five
    tokens, or with chunks of items of all tokens of a device together with their target scores; the
    number of terms; the gradient by the queries; all gradients that are summed over `data`. XLA
    merges some of them. Chunks of items do not add collectives.
    """
    mesh = mesh_lib.make_mesh(data, model)
    options = {'num_items': 20_000, 'chunk_items': chunk_items, 'all_terms': False}
    compiled = compile_block(*make_program(mesh, **options), 20_000)
    sent = collectives(compiled)
    part = mesh_lib.table_rows(20_000, mesh) // model * 8
    assert len(sent) <= 5
    gathered = 3 * 64 // data if chunk_items else 2 * 5
    assert [size for kind, size in sent if kind == 'all-gather'] == [model * gathered]
    long = [size for kind, size in sent if kind != 'all-gather' and size > 64 * 8]
    # Loops over chunks of tokens gather maxima and sums; loops over chunks of items send nothing.
    assert len(collectives_in_loops(compiled)) == (0 if chunk_items else 1)
    # The gradient of a shard of the table goes to the devices with the same shard.
    assert long == ([] if data == 1 else [part])


@on_eight
@pytest.mark.parametrize('chunk_items', [300, slow(0)])
def test_a_step_with_all_terms_sends_no_table_either(chunk_items):
    """Two losses send their parts twice; of the table they send a shard's gradient alone."""
    mesh = mesh_lib.make_mesh(4, 2)
    compiled = compile_block(*make_program(mesh, num_items=20_000, chunk_items=chunk_items), 20_000)
    sent = collectives(compiled)
    part = mesh_lib.table_rows(20_000, mesh) // 2 * 8
    assert len(sent) <= 2 * 5
    long = [(kind, size) for kind, size in sent if size >= part]
    assert ('all-reduce', part) in long
    assert set(long) <= {('all-reduce', part), ('all-reduce', 2 * part)}


@pytest.mark.slow
@on_eight
@pytest.mark.parametrize('all_terms, gradients', [(False, 1), (True, 3)])
def test_a_step_with_chunks_of_items_needs_few_gradients_of_a_shard(all_terms, gradients):
    """One; with a second loss its own and the sum of both, too."""
    mesh = mesh_lib.make_mesh(1, 8)
    options = {'num_items': 200_000, 'chunk_items': 512, 'all_terms': all_terms}
    memory = compile_block(*make_program(mesh, **options)).memory_analysis()
    part = mesh_lib.table_rows(200_000, mesh) // 8 * 8 * 4
    assert memory.alias_size_in_bytes >= 3 * part
    assert memory.temp_size_in_bytes < (gradients + 0.5) * part


@on_eight
def test_a_sharded_table_is_updated_in_place():
    mesh = mesh_lib.make_mesh(2, 4)
    memory = compile_block(*make_program(mesh, num_items=20_000)).memory_analysis()
    tables = 3 * mesh_lib.table_rows(20_000, mesh) * 8 * 4 // 4
    assert memory.alias_size_in_bytes >= tables
    assert memory.argument_size_in_bytes < 1.1 * tables  # a quarter per device
