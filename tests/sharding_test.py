"""Several devices and processes do what one does.

XLA makes eight devices of one CPU, but only in a process that asked for them at its start: the
first test runs the others in one that did.
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from fame_jax import config as config_lib
from fame_jax import losses, programs, sharding
from fame_jax.batch import Batch
from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.models.build import build, build_objective, initial
from fame_jax.models.items import unit

EIGHT = jax.device_count() == 8
on_eight = pytest.mark.skipif(not EIGHT, reason='run by test_on_eight_devices')
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
FLAGS = [
    *('--synthetic_users=120', '--synthetic_items=45', '--k_core=0', '--width=8'),
    *('--pretrain_epochs=2', '--finetune_epochs=2', '--num_experts=2', '--max_length=12'),
    *('--rows_per_step=8', '--row_length=16', '--chunk_tokens=7', '--progress=lines'),
]


def eight_devices():
    flags = os.environ.get('XLA_FLAGS', '')
    return {**os.environ, 'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8'}


def run_on_eight(file, marked):
    """The tests of a file that bear a mark, in a process of eight devices."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    done = subprocess.run(
        [*command, '-m', marked, file], env=eight_devices(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'passed' in done.stdout


@pytest.mark.skipif(EIGHT, reason='runs the others')
def test_on_eight_devices():
    run_on_eight(__file__, 'not slow')


@pytest.mark.slow
@pytest.mark.skipif(EIGHT, reason='runs the others')
def test_on_eight_devices_at_length():
    run_on_eight(__file__, 'slow')


def test_one_device_is_no_mesh():
    assert sharding.make_mesh(1, 1) is None
    assert sharding.table_rows(44, None) == 45
    assert sharding.rows_of_process(None, 8) == slice(0, 8)


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match='asks for 64 devices and there are'):
        sharding.make_mesh(8, 8)


@on_eight
@pytest.mark.parametrize('model, rows', [(1, 46), (2, 46), (4, 48), (8, 48)])
def test_rows_of_a_table_divide_among_its_devices(model, rows):
    assert sharding.table_rows(45, sharding.make_mesh(8 // model, model)) == rows


def make_state(mesh, name='fame', num_items=45, **changes):
    config = config_lib.Config(
        width=8, num_experts=2, max_length=6, row_length=8, chunk_tokens=5, **changes
    )
    module = build(name, config, num_items, mesh)
    params = sharding.born(functools.partial(initial, module), mesh)(jax.random.key(0))
    optimizer = programs.make_optimizer(1e-2, 0.999, 0.0)
    objective = functools.partial(build_objective(name, config), module)
    step = programs.make_step(objective, optimizer)
    return programs.begin(params, optimizer, mesh), programs.Program(step, 2, mesh)


def some_batch(seed, num_items=45, shape=(8, 8)):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(1, num_items + 1, (2, *shape)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32) % 4, shape).copy()
    segments = np.broadcast_to(1 + np.arange(shape[1], dtype=np.int32) // 4, shape).copy()
    weights = (rng.random(shape) > 0.2).astype(np.float32)
    return Batch(tokens, positions, segments, targets, weights)


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_each_device_holds_its_part_of_the_tables_and_no_more(data, model):
    state, _ = make_state(sharding.make_mesh(data, model))
    tables = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if 'item_table' in jax.tree_util.keystr(path)
    ]
    assert len(tables) == 3  # the table and its two moments
    rows = sharding.table_rows(45, sharding.make_mesh(data, model))
    for table in tables:
        assert table.shape == (rows, 8)
        assert {shard.data.shape for shard in table.addressable_shards} == {(rows // model, 8)}
    assert state.params['facet_block']['gate'].sharding.is_fully_replicated


@on_eight
@pytest.mark.parametrize(
    'name, data, model, chunk_items',
    [
        ('fame', 4, 2, 0),
        ('fame', 2, 4, 5),
        ('sasrec', 1, 8, 0),
        *(
            pytest.param(*case, 0, marks=pytest.mark.slow)
            for case in [
                *(('fame', *mesh) for mesh in MESHES if mesh != (4, 2)),
                *((name, 4, 2) for name in ('gru4rec', 'atten_mixer', 'cl4srec')),
            ]
        ),
    ],
)
def test_steps_on_a_mesh_are_those_of_one_device(name, data, model, chunk_items):
    """From the same parameters, with dropout; rows past V start at random and go nowhere."""
    one, program_one = make_state(None, name)
    many, program_many = make_state(sharding.make_mesh(data, model), name, chunk_items=chunk_items)
    for seed in range(2):
        block = [some_batch(2 * seed), some_batch(2 * seed + 1)]
        one, sums_one = program_one(one, block, jax.random.key(1))
        many, sums_many = program_many(many, block, jax.random.key(1))
        np.testing.assert_allclose(sums_one, sums_many, rtol=2e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(one.params):
        other = functools.reduce(lambda tree, key: tree[key.key], path, many.params)
        np.testing.assert_allclose(leaf, np.asarray(other)[: len(leaf)], atol=2e-3, rtol=2e-3)


def cosine(row_VD):
    return unit(row_VD, 0.5)


def half_cosine(row_VD):
    """As a model of bfloat16 has it: the table is float32."""
    return unit(row_VD.astype(jnp.bfloat16), 0.5)


def loss_and_gradients(loss, *args):
    """Of 3 times the sum and the count, by queries, table and weights."""

    def weighed(query_TD, item_VD, weight_T, target_T):
        total, count = loss(query_TD, item_VD, target_T, weight_T)
        return 3 * total + count

    return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*args)


def assert_divided_is_whole(
    mesh,
    num_items,
    tokens,
    chunks,
    prepare=losses.as_they_are,
    seed=0,
    dtypes=(jnp.float32, jnp.float32),
    nobodys=None,
    bound=1e-4,
):
    """The loss of a mesh against that of one device, as far as rows are an item's."""
    mesh = sharding.make_mesh(*mesh)
    keys = jax.random.split(jax.random.key(seed), 4)
    query_TD = jax.random.normal(keys[0], (8 * tokens, 4)).astype(dtypes[0])
    rows = sharding.table_rows(num_items, mesh)
    item_VD = jax.random.normal(keys[1], (rows, 4)).astype(dtypes[1])
    target_T = jax.random.randint(keys[2], (8 * tokens,), 1, num_items + 1)
    weight_T = (jax.random.uniform(keys[3], (8 * tokens,)) > 0.3).astype(jnp.float32)
    target_T = jnp.where(weight_T > 0, target_T, 0)

    def one(query_TD, item_VD, *others):
        return losses.cross_entropy(query_TD, prepare(item_VD[: num_items + 1]), *others)

    chunk_tokens, chunk_items = chunks
    many = functools.partial(
        losses.divided_cross_entropy,
        mesh=mesh,
        num_items=num_items,
        chunk_tokens=chunk_tokens,
        chunk_items=chunk_items,
        prepare=prepare,
    )
    want = loss_and_gradients(one, query_TD, item_VD, weight_T, target_T)
    if nobodys is not None:
        item_VD = item_VD.at[0].set(nobodys).at[num_items + 1 :].set(nobodys)
    found = loss_and_gradients(many, query_TD, item_VD, weight_T, target_T)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1, np.abs(b).max()))
    d_item_VD = np.asarray(found[1][1])
    assert not np.any(d_item_VD[0]) and not np.any(d_item_VD[num_items + 1 :])


@on_eight
@given(
    mesh=st.sampled_from(MESHES),
    num_items=st.integers(1, 30),
    tokens=st.integers(1, 4),
    chunks=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    prepare=st.sampled_from([losses.as_they_are, cosine]),
    seed=st.integers(0, 99),
)
# Three rows each in chunks of two, and the last two devices have no item.
@example(mesh=(1, 8), num_items=17, tokens=1, chunks=(3, 2), prepare=cosine, seed=0)
@settings(max_examples=8, deadline=None)
def test_divided_cross_entropy_is_cross_entropy(mesh, num_items, tokens, chunks, prepare, seed):
    """Values and gradients, with devices that hold no item at all."""
    assert_divided_is_whole(mesh, num_items, tokens, chunks, prepare, seed)


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_chunks_of_a_devices_rows(data, model):
    """Fewer than a device has, so that every mesh streams, and no multiple of them."""
    for num_items, chunks in ((23, (3, 2)), (100, (0, 9))):
        assert_divided_is_whole((data, model), num_items, 3, chunks, cosine)


@on_eight
@pytest.mark.parametrize('chunk_items', [0, 5])
@pytest.mark.parametrize(
    'prepare, dtypes',
    [
        (losses.as_they_are, (jnp.bfloat16, jnp.bfloat16)),
        (half_cosine, (jnp.bfloat16, jnp.float32)),
    ],
)
def test_divided_in_bfloat16(prepare, dtypes, chunk_items):
    chunks, bound = (5, chunk_items), 4 * 2**-8
    assert_divided_is_whole((2, 4), 45, 4, chunks, prepare, dtypes=dtypes, bound=bound)


@on_eight
@pytest.mark.parametrize('nobodys', [1e30, np.inf, np.nan])
def test_rows_of_nobody_are_not_felt(nobodys):
    """Row 0 and those past V, in a chunk beside items and, the last, in one without any."""
    assert_divided_is_whole((2, 4), 9, 2, (3, 2), nobodys=nobodys)


@on_eight
def test_a_divided_loss_refuses_chunks_below_0():
    with pytest.raises(ValueError, match='chunks must be >= 0, not 0 tokens and -1 items'):
        assert_divided_is_whole((2, 4), 9, 2, (0, -1))


def collectives(compiled):
    """(kind, elements of the largest operand) of each in a compiled program's text."""
    found = []
    pattern = r'= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\('
    for shapes, kind in re.findall(pattern, compiled.as_text()):
        sizes = [
            int(np.prod([int(n) for n in dims.split(',') if n] or [1]))
            for dims in re.findall(r'\w+\[([\d,]*)\]', shapes)
        ]
        found.append((kind, max(sizes)))
    return found


def in_loops_of_a_part(compiled):
    """The collectives in a loop of what is written for one device's part."""
    lines = re.findall(r'.* (?:all-reduce|all-gather)\(.*', compiled.as_text())
    return [line for line in lines if 'shard_map/while' in line]


@on_eight
@pytest.mark.parametrize('chunk_items', [0, 300])
@pytest.mark.parametrize('data, model', [(4, 2), (1, 8)])
def test_what_goes_between_devices_is_short(data, model, chunk_items):
    """A step's collectives, by what they carry: 20,001 rows of 8 are far more than all else.

    Looked-up rows, and targets' vectors together with them; maxima and sums, of a chunk of five
    tokens, or, with chunks of items, of all of a device's tokens and with their targets' scores;
    the count of terms; the gradient by the queries; every gradient that the devices of `data` have
    a part of. XLA has joined what can go together. Chunks of items do not make them more.
    """
    mesh = sharding.make_mesh(data, model)
    state, program = make_state(mesh, num_items=20_000, chunk_items=chunk_items)
    compiled = program.compile(state, some_batch(0, 20_000), jax.random.key(1))
    found = collectives(compiled)
    part = sharding.table_rows(20_000, mesh) // model * 8
    assert len(found) <= 5
    gathered = 3 * 64 // data if chunk_items else 2 * 5
    assert [size for kind, size in found if kind == 'all-gather'] == [model * gathered]
    long = [size for kind, size in found if kind != 'all-gather' and size > 64 * 8]
    # In loops over chunks, of tokens alone, maxima and sums are gathered; of items, nothing is.
    assert len(in_loops_of_a_part(compiled)) == (0 if chunk_items else 1)
    # The gradient of a device's own part goes to those that have the same part; no table does.
    assert long == ([] if data == 1 else [part])


@on_eight
@pytest.mark.parametrize('data, model', [(2, 4), (1, 8)])
def test_a_divided_loss_in_chunks_takes_no_second_table(data, model):
    """Beside the gradient that it returns: the one that is summed over `data`, and a chunk's."""
    mesh = sharding.make_mesh(data, model)
    tokens, items = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('data', 'model'))

    def temporaries(num_items, chunk_items):
        rows = sharding.table_rows(num_items, mesh)
        shapes = [((512, 64), 'float32', tokens), ((rows, 64), 'float32', items)]
        shapes += [((512,), 'int32', tokens), ((512,), 'float32', tokens)]
        many = functools.partial(
            losses.divided_cross_entropy,
            mesh=mesh,
            num_items=num_items,
            chunk_tokens=64,
            chunk_items=chunk_items,
            prepare=cosine,
        )
        f = jax.jit(jax.grad(lambda *args: many(*args)[0], argnums=(0, 1)))
        args = [jax.ShapeDtypeStruct(*shape[:2], sharding=shape[2]) for shape in shapes]
        return f.lower(*args).compile().memory_analysis().temp_size_in_bytes

    part = sharding.table_rows(200_000, mesh) // model * 64 * 4
    summed = part if data > 1 else 0
    assert temporaries(200_000, 512) < summed + 2e6
    assert temporaries(200_000, 0) > summed + 2 * part


@on_eight
def test_a_step_in_chunks_takes_a_gradient_beside_the_state():
    mesh = sharding.make_mesh(1, 8)
    state, program = make_state(mesh, num_items=200_000, chunk_items=512)
    memory = program.compile(state, some_batch(0), jax.random.key(1)).memory_analysis()
    part = sharding.table_rows(200_000, mesh) // 8 * 8 * 4
    assert memory.alias_size_in_bytes >= 3 * part
    assert memory.temp_size_in_bytes < 1.5 * part


@on_eight
def test_a_sharded_table_is_updated_in_place():
    mesh = sharding.make_mesh(2, 4)
    state, program = make_state(mesh, num_items=20_000)
    memory = program.compile(state, some_batch(0), jax.random.key(1)).memory_analysis()
    tables = 3 * sharding.table_rows(20_000, mesh) * 8 * 4 // 4
    assert memory.alias_size_in_bytes >= tables
    assert memory.argument_size_in_bytes < 1.1 * tables  # on each device a quarter


def lines_of(folder, split='validation'):
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in lines if line['split'] == split]


def assert_same_run(one, other):
    """Losses and parameters to float tolerance, figures of the judge exactly."""
    for line, same in zip(lines_of(one, 'train'), lines_of(other, 'train'), strict=True):
        assert (line['stage'], line['epoch']) == (same['stage'], same['epoch'])
        np.testing.assert_allclose(line['loss'], same['loss'], rtol=1e-5)
    results = [
        json.loads((folder / 'results.json').read_text())['results'] for folder in (one, other)
    ]
    for stage in ('popularity', 'pretrain', 'finetune'):
        assert results[0][stage]['test'] == results[1][stage]['test']
    (_, parameters), (_, others) = (stored(folder) for folder in (one, other))
    for leaf, same in zip(jax.tree.leaves(parameters), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(leaf, same, atol=2e-4)


def stored(folder):
    """The best parameters of fine-tuning, as one device reads them."""
    from fame_jax import run as run_lib

    config = config_lib.read(folder / 'flags.cfg')
    run = run_lib.open_run(config_lib.parse([f'--workdir={folder}', '--progress=none']))
    return config, run.best('finetune')[0]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run of one device."""
    folder = tmp_path_factory.mktemp('alone')
    assert main([*FLAGS, f'--workdir={folder}']) == 0
    return folder


@pytest.mark.slow
@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_a_run_on_a_mesh_is_that_of_one_device(data, model, alone, tmp_path):
    flags = [f'--data_parallel={data}', f'--model_parallel={model}']
    assert main([*FLAGS, *flags, f'--workdir={tmp_path}']) == 0
    assert_same_run(alone, tmp_path)


@on_eight
def test_a_run_goes_on_with_other_devices(alone, tmp_path):
    """Pre-trained on eight, fine-tuned on four that share otherwise, judged by eight and by one."""
    steps = [
        ['--stages=prepare,pretrain', '--data_parallel=2', '--model_parallel=4'],
        ['--stages=pretrain,finetune', '--data_parallel=4', '--model_parallel=1'],
        ['--stages=evaluate', '--model_parallel=8'],
        ['--stages=evaluate'],
    ]
    for step in steps:
        assert main([*FLAGS, *step, f'--workdir={tmp_path}']) == 0
        if 'evaluate' in step[0]:
            assert_same_run(alone, tmp_path)


@pytest.mark.slow
@on_eight
def test_a_checkpoint_in_mid_epoch_goes_to_another_mesh(alone, tmp_path, monkeypatch):
    """Stopped after its first steps on 2 x 4, and gone on with on 4 x 2: tables are padded anew."""
    flags = [*FLAGS, f'--workdir={tmp_path}', '--checkpoint_every=1']
    calls = []

    program = programs.Program.__call__
    with monkeypatch.context() as patch:

        def call(self, state, block, key):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return program(self, state, block, key)

        patch.setattr(programs.Program, '__call__', call)
        assert main([*flags, '--data_parallel=2', '--model_parallel=4']) == 128 + signal.SIGTERM
    assert main([*flags, '--data_parallel=4', '--model_parallel=2']) == 0
    assert_same_run(alone, tmp_path)


def start_two(folder, *flags, devices=4):
    """Two processes of one run, with so many devices each; their output goes to files."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        # They compile together, and what is half written by the one is not the other's.
        'JAX_ENABLE_COMPILATION_CACHE': 'false',
    }
    command = [sys.executable, '-m', 'fame_jax.main', *FLAGS, *flags, f'--workdir={folder}']
    command += [f'--coordinator=127.0.0.1:{port}', '--num_processes=2']
    processes = []
    for i in range(2):
        with open(folder / f'output{i}', 'w') as output:
            processes.append(
                subprocess.Popen(
                    [*command, f'--process={i}'],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def wait_for(folder, line, seconds=240):
    """Until the first process has printed the line."""
    end = time.monotonic() + seconds
    while line not in (folder / 'output0').read_text():
        assert time.monotonic() < end, (folder / 'output0').read_text()
        time.sleep(0.1)


def ended(processes, seconds=240):
    """Their exit codes."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.skipif(EIGHT, reason='has devices of its own')
def test_two_processes_are_one_run(alone, tmp_path):
    processes = start_two(tmp_path, '--data_parallel=4', '--model_parallel=2')
    assert ended(processes) == [0, 0], (tmp_path / 'output0').read_text()
    assert_same_run(alone, tmp_path)
    assert 'HR@10' not in (tmp_path / 'output1').read_text()  # one of them tells


LONG = ['--stages=prepare,pretrain', '--pretrain_epochs=400', '--patience=400']


@pytest.mark.slow
@pytest.mark.skipif(EIGHT, reason='has devices of its own')
def test_sigterm_to_one_stops_both_and_the_run_goes_on(tmp_path):
    flags = [*LONG, '--data_parallel=1', '--model_parallel=8']
    processes = start_two(tmp_path, *flags)
    wait_for(tmp_path, 'pretrain 2/400')
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes) == [128 + signal.SIGTERM] * 2
    assert 'stopped by SIGTERM in pretrain: saved at step' in (tmp_path / 'output0').read_text()
    epochs = len(lines_of(tmp_path, 'train'))
    processes = start_two(tmp_path, *flags)
    wait_for(tmp_path, 'goes on at epoch')
    wait_for(tmp_path, f'pretrain {epochs + 2}/400')
    processes[0].send_signal(signal.SIGINT)
    assert ended(processes) == [128 + signal.SIGTERM] * 2


@pytest.mark.slow
@pytest.mark.skipif(EIGHT, reason='has devices of its own')
@pytest.mark.parametrize('dies', [0, 1])
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(dies, tmp_path):
    processes = start_two(tmp_path, *LONG, '--data_parallel=4', '--model_parallel=2')
    wait_for(tmp_path, 'pretrain 2/400')
    processes[dies].kill()
    assert ended(processes, 90)[1 - dies] not in (0, None)
    told = (tmp_path / f'output{1 - dies}').read_text()
    assert 'another task died' in told
    epochs = len(lines_of(tmp_path, 'train'))
    shorter = ['--stages=pretrain', f'--pretrain_epochs={epochs + 2}', '--patience=400']
    flags = [flag for flag in FLAGS if 'epochs' not in flag]
    text = (tmp_path / 'flags.cfg').read_text()
    (tmp_path / 'flags.cfg').write_text(re.sub('--pretrain_epochs=.*', shorter[1], text))
    assert main([*flags, *shorter, f'--workdir={tmp_path}']) == 0
    assert len(lines_of(tmp_path, 'train')) == epochs + 2
