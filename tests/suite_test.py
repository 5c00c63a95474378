"""The benchmark suite: what it counts against counts by hand, and what becomes of records."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import attention_alone, loss_alone, roofline, suite, suite_page, turns, whole_job
from benchmarks import train_throughput as training
from fame_jax import config as config_lib
from fame_jax import run as run_lib
from fame_jax import stages

RATES = {'float32': 1e12, 'bfloat16': 1e13, 'copy': 1e11}
ONCE = turns.Effort(rounds=1, seconds=0, quick=True)
NEVER = float('inf')


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jnp.zeros(shape) for shape in shapes)).compile()


def test_a_product_is_counted_as_by_hand():
    found = roofline.count(compiled(jnp.matmul, (8, 16), (16, 32)))
    assert found.flops == 2 * 8 * 16 * 32
    assert found.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert (found.loops, found.once) == (0, 0)


@pytest.mark.parametrize('loop_turns', [2, 7])
def test_a_scanned_product_is_counted_as_often_as_it_turns(loop_turns):
    def scanned(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, length=loop_turns)[0]

    program = compiled(scanned, (8, 16), (16, 16))
    found = roofline.count(program)
    products = loop_turns * 2 * 8 * 16 * 16
    assert products <= found.flops < 1.05 * products  # and a little counting of turns
    assert found.bytes > loop_turns * 4 * (2 * 8 * 16 + 16 * 16)
    assert (found.loops, found.once) == (1, 0)
    assert program.cost_analysis()['flops'] < 1.05 * products / loop_turns  # XLA's own


def test_loops_within_loops():
    def nested(x, w):
        return lax.fori_loop(0, 5, lambda _, x: lax.fori_loop(0, 3, lambda _, x: x @ w, x), x)

    products = 5 * 3 * 2 * 8 * 16 * 16
    found = roofline.count(compiled(nested, (8, 16), (16, 16)))
    assert products <= found.flops < 1.05 * products
    assert found.once == 0


def test_a_loop_whose_turns_nobody_knows_is_taken_once_and_told():
    def unknown(x, w):
        return lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w + 1, x)

    found = roofline.count(compiled(unknown, (8, 16), (16, 16)))
    assert 2 * 8 * 16 * 16 <= found.flops < 2 * 2 * 8 * 16 * 16
    assert (found.loops, found.once) == (0, 1)


CUDA_TEXT = """HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[8,16], f32[4,16,32])) -> (s32[], f32[8,16], f32[4,16,32]) {
  %arg = (s32[], f32[8,16]{1,0}, f32[4,16,32]{2,1,0}) parameter(0), metadata={op_name="a{b}"}
  %i = s32[] get-tuple-element(%arg), index=0
  %x.1 = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %w = f32[4,16,32]{2,1,0} get-tuple-element(%arg), index=2
  %gemm.1 = (f32[4,8,32]{2,1,0}, s8[64]{0}) custom-call(%x.1, %w), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[4,16,32]{2,1,0}) tuple(%i, %x.1, %w)
}

%condition (arg.1: (s32[], f32[8,16], f32[4,16,32])) -> pred[] {
  %arg.1 = (s32[], f32[8,16]{1,0}, f32[4,16,32]{2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[8,16], f32[4,16,32])) -> (s32[], f32[8,16], f32[4,16,32]) {
  %p = (s32[], f32[8,16]{1,0}, f32[4,16,32]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,16]{1,0}, f32[4,16,32]{2,1,0}) while(%p), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
}
"""


def test_products_of_a_library_are_counted():
    """As XLA writes them for a CUDA device, in a loop; XLA's analysis itself sees none there."""

    class Compiled:
        def as_text(self):
            return CUDA_TEXT

    found = roofline.count(Compiled())
    assert found.flops == 6 * 2 * (4 * 8 * 32) * 16
    arrays = 6 * 4 * (8 * 16 + 4 * 16 * 32 + 4 * 8 * 32)
    assert arrays <= found.bytes < 1.05 * arrays  # and what the loop itself reads
    assert (found.loops, found.once) == (1, 0)


def test_what_cannot_be_counted_is_still_timed(monkeypatch):
    monkeypatch.setattr(roofline, '_cost', lambda text: 1 / 0)
    record = turns.work(compiled(jnp.matmul, (8, 16), (16, 32)))
    assert record['not_counted'] == 'ZeroDivisionError: division by zero'
    assert record['temporaries_bytes'] >= 0 and suite_page.share(record, RATES) == {}


def test_a_loss_in_chunks_has_the_operations_of_a_plain_one():
    make = functools.partial(loss_alone.make_data, 64, 200, 16, 'float32')
    data = jax.eval_shape(make)
    several = loss_alone.make_variants([(16, 0)], quick=True)
    plain, chunked = (
        roofline.count(jax.jit(several[name]).lower(*data).compile()).flops
        for name in ('cross_entropy', 'chunked 16 x all')
    )
    assert plain > 3 * 2 * 64 * 200 * 16
    assert chunked == pytest.approx(plain, rel=0.1)


def test_the_device_has_rates(monkeypatch):
    monkeypatch.setattr(roofline, 'SIZES', (64,))
    monkeypatch.setitem(roofline.FLOATS, 'cpu', 1000)
    found = roofline.rates()
    assert {'float32', 'bfloat16', 'copy'} <= set(found)
    assert all(rate > 0 for rate in found.values())


class Fake:
    """A contender that writes down what is asked of it."""

    def __init__(self, name, told, seconds=1.0, fails_at=None):
        self.name, self.told, self.seconds, self.fails_at = name, told, seconds, fails_at

    def take_turn(self, seconds):
        self.told.append(self.name)
        if self.told.count(self.name) == self.fails_at:
            raise MemoryError(f'{self.name} is too large\nby far')

    def record(self):
        return turns.spread([self.seconds] * 3)


def test_contenders_take_turns_and_what_fails_ends_nothing():
    told = []

    def refuse():
        raise ValueError('not supported')

    found = turns.contest(
        {
            'a': lambda: Fake('a', told, 2.0),
            'b': refuse,
            'c': lambda: Fake('c', told, fails_at=2),
            'd': lambda: Fake('d', told, 6.0),
        },
        turns.Effort(rounds=3, seconds=0.1),
    )
    assert ''.join(told) == 'acd' + 'acd' + 'ad'
    assert [record['name'] for record in found] == ['a', 'b', 'c', 'd']
    assert found[1]['failed'] == 'ValueError: not supported'
    assert found[2]['failed'] == 'MemoryError: c is too large'
    assert [found[0]['ratio'], found[3]['ratio']] == [1, 3]


def test_what_would_begin_too_late_is_left_out():
    told = []
    found = turns.contest({'a': lambda: Fake('a', told)}, ONCE, time.monotonic() - 1)
    assert found == [{'name': 'a', 'failed': 'left out: the time was up'}]
    assert told == []


def test_ratios_are_of_the_same_work():
    def record(median, **more):
        return {'seconds': {'median': median}, **more}

    found = turns.compare([{'failed': ''}, record(2, per_second=5), record(8, per_second=10)])
    assert [found[1]['ratio'], found[2]['ratio']] == [1, 0.5]
    assert [r['ratio'] for r in turns.compare([record(2), record(3)])] == [1, 1.5]


@pytest.mark.parametrize('ahead', [True, False])
def test_calls_follow_one_another_and_all_are_timed(monkeypatch, ahead):
    """With a clock that a call moves by a second; ahead, the second call comes before the wait."""
    now, told = [0.0], []

    def call():
        told.append('call')
        return len(told)

    def wait(value):
        told.append('wait')
        now[0] += 1

    monkeypatch.setattr(turns.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(turns.jax, 'block_until_ready', wait)
    assert turns.time_calls(call, 2, ahead) == ([1, 1, 1] if ahead else [1, 1])
    first = ['call', 'call', 'wait'] if ahead else ['call', 'wait', 'call']
    assert told[:3] == first and told.count('call') == told.count('wait')
    told.clear()
    assert turns.time_calls(call, 0, ahead) == [1] and told == ['call', 'wait']


def test_a_compilation_is_heard():
    with turns.CompileClock() as clock:
        jax.jit(lambda x: x * 3.25 + time.monotonic_ns() % 1000)(jnp.ones(3)).block_until_ready()
    heard = clock.seconds
    assert heard > 0
    jax.jit(lambda x: x * 4.25 + time.monotonic_ns() % 1000)(jnp.ones(3)).block_until_ready()
    assert clock.seconds == heard


def test_shares_are_of_the_rate_of_the_dtype():
    record = {'seconds': {'median': 0.5}, 'flops': 1e11, 'bytes': 1e10}
    found = suite_page.share(record, RATES)
    assert found['of_products'] == pytest.approx(0.2)
    assert found['of_copy'] == pytest.approx(0.2)
    found = suite_page.share(record | {'dtype': 'bfloat16'}, RATES)
    assert found['of_products'] == pytest.approx(0.02)
    assert suite_page.share({'bytes_per_second': 5}, RATES) == {'bytes_per_second': 5}


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (0, '0.00'),
        (1.234, '1.23'),
        (12.34, '12.3'),
        (99.96, '100'),
        (999.6, '1.00k'),
        (19243, '19.2k'),
        (4.3e12, '4.30T'),
        (2.5e15, '2.50P'),
    ],
)
def test_numbers_have_three_digits(value, expected):
    assert suite_page.prefixed(value) == expected


SECTIONS = {
    'step': {
        'unit': 'targets',
        'records': [
            {
                'name': 'SASRec',
                'seconds': {'median': 0.0264, 'p10': 0.0248, 'p90': 0.0394},
                'calls': 8,
                'per_second': 19243.6,
                'ratio': 1.0,
                'flops': 2.64e9,
                'bytes': 2.64e8,
                'temporaries_bytes': 25e6,
                'compile_seconds': 2.52,
            },
            {'name': 'FAME H 2 N 8 512 rbg bfloat16', 'failed': 'XlaRuntimeError: out of memory'},
            {
                'name': 'a loop',
                'seconds': {'median': 2.5e-5, 'p10': 2e-5, 'p90': 3e-5},
                'calls': 1,
                'flops': 0,
                'bytes': 0,
                'loops_counted_once': 1,
            },
        ],
    },
    'memory': {'unit': '', 'records': [{'name': 'process', 'temporaries_bytes': 2.1e9}]},
}


def rows(text):
    return [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in text.splitlines()
        if line.startswith('|')
    ]


def test_the_table():
    text = suite_page.table(SECTIONS, RATES)
    assert max(map(len, text.splitlines())) <= 120
    head, rule, *lines = rows(text)
    assert set(''.join(rule)) == {'-', ':'} and len(head) == len(rule)
    assert lines == [
        ['**step**', '', '', 'targets', '', '', '', ''],
        [
            *('SASRec', '26.4 (24.8-39.4) ms', '1.00', '19.2k'),
            *('100G 10%', '10.0G 10%', '25', '2.52'),
        ],
        ['FAME H 2 N 8 512 rbg bfloat16', 'not measured [1]', *[''] * 6],
        ['a loop', '25.0 us', '', '', '>0.00 0%', '>0.00 0%', '', ''],
        ['**memory**', *[''] * 7],
        ['process', '', '', '', '', '', '2,100', ''],
    ]
    assert text.splitlines()[-1] == '[1] XlaRuntimeError: out of memory'
    assert len({line.index('|', 2) for line in text.splitlines() if line.startswith('|')}) == 1


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A small world and a small model."""
    config = config_lib.Config(
        workdir=str(tmp_path_factory.mktemp('suite') / 'base'),
        progress='none',
        synthetic_users=150,
        synthetic_items=60,
        width=32,
        num_blocks=1,
        row_length=32,
        max_length=16,
        steps_per_dispatch=2,
    )
    run = run_lib.open_run(config)
    stages.prepare(run)
    return run


def test_what_the_suite_leaves(base, monkeypatch, tmp_path, capsys):
    def measure(run, effort, deadline):
        assert run is base and effort == suite.QUICK and deadline > time.monotonic()
        return SECTIONS['step']['records']

    sections = {'step': suite.Section(measure, 'targets', 0.5), 'loss': None}
    monkeypatch.setattr(suite, 'SECTIONS', sections)
    monkeypatch.setattr(suite, 'open_base', lambda *_: base)
    monkeypatch.setattr(roofline, 'rates', lambda: RATES)
    path = tmp_path / 'new' / 'a.json'
    assert suite.main(['--quick', '--only=step', f'--out={path}']) == 0
    told = json.loads(path.read_text())
    assert {'machine', 'arguments', 'dataset', 'rates', 'sections', 'seconds'} == set(told)
    assert {'processor', 'cores', 'memory_bytes', 'load', 'versions', 'date'} < set(told['machine'])
    assert list(told['sections']) == ['device', 'step', 'memory']
    assert told['sections']['step']['records'][0]['of_products'] == pytest.approx(0.1)
    captured = capsys.readouterr()
    assert 'suite: 1/1 step' in captured.err
    assert path.with_suffix('.md').read_text() == captured.out
    assert '19.2k' in captured.out and '**loss**' not in captured.out
    assert 'product, bfloat16' in captured.out


def test_where_it_is_written(tmp_path):
    assert suite.place(tmp_path / 'b.json', 'cpu') == tmp_path / 'b.json'
    assert suite.place(tmp_path, 'NVIDIA H200') == tmp_path / 'suite_nvidia_h200.json'


def test_a_section_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        suite.parse_arguments(['--only=step,lunch'])
    assert '--only=lunch: there are step, ' in capsys.readouterr().err


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('quick', [True, False])
def test_every_variant_is_a_configuration(base, monkeypatch, backend, quick):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    found = training.variants(base, quick)
    for name, (_, changes) in found.items():
        training.changed(base, **{**changes, 'width': 64})
        assert len(name) <= 30
    assert next(iter(found)) == 'SASRec' and not found['SASRec'][1]
    assert all(len(name) <= 30 for name in training.command_buffers(base))
    assert bool(training.command_buffers(base)) == (backend == 'gpu')


def test_padded_rows_hold_as_many_targets(base):
    def targets(run):
        epoch = stages.epochs_of(run, 'finetune')(0)
        return sum(float(batch.weights_BL.sum()) for batch in epoch.batches) / epoch.num_steps

    rows = training._padded_rows(base)
    padded = training.changed(base, packed=False, rows_per_step=rows)
    # The last step of either is filled up.
    assert targets(padded) == pytest.approx(targets(base), rel=0.25)


def test_a_step_is_told_as_one_step(base):
    """Whatever a dispatch holds: the counts are XLA's for one step, the time is shared out."""
    records = []
    for size in (1, 4):
        variant = training.Variant('a', training.changed(base, steps_per_dispatch=size), 'sasrec')
        for _ in range(4):
            variant.take_turn(0)
        (times,) = variant.times.values()
        assert len(times) == 4
        assert variant.state.step == 4 * size
        records.append(variant.record())
    one, four = records
    assert one['flops'] == pytest.approx(four['flops'], rel=0.02)
    assert one['loops_counted_once'] == four['loops_counted_once'] == 0
    # Three products of the loss, at least.
    assert one['flops'] > 6 * 8 * 32 * base.data.num_items * 32
    assert one['terms_per_epoch'] == pytest.approx(variant.weights)


def test_an_epoch_takes_all_its_steps(base):
    variant = training.Variant('a', training.changed(base, steps_per_dispatch=3), 'sasrec')
    variant.run_epoch()
    assert variant.state.step == variant.num_steps and variant.num_steps % 3


def test_both_ways_to_attend_are_one_function():
    data = attention_alone.make_data(2, 13, 3, 'float32')
    ours = attention_alone.einsums(*data)
    theirs = attention_alone.grouped(*data, implementation='xla')
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    dropped = attention_alone.einsums(*data, rate=0.5)
    assert not np.allclose(ours, dropped)


@pytest.mark.parametrize(
    'name',
    [
        *('input', 'evaluation', 'loss', 'attention'),
        pytest.param('epoch', marks=pytest.mark.slow),
    ],
)
def test_each_section_measures(base, monkeypatch, name):
    monkeypatch.setattr(attention_alone, 'LENGTHS', (5,))
    monkeypatch.setitem(loss_alone.TOKENS, 'cpu', 32)
    monkeypatch.setitem(loss_alone.CHUNKS, 'cpu', ((8, 16),))
    found = suite.SECTIONS[name].measure(base, ONCE, NEVER)
    assert found and not [record for record in found if 'failed' in record]
    assert all(record['per_second'] > 0 for record in found)
    assert '>' not in ''.join(cell for r in found for cell in suite_page.cells(r, RATES)[4:])


@pytest.mark.slow
def test_a_whole_job(base):
    found = whole_job.time_job(base, ONCE, NEVER)
    names = ['prepare', 'pretrain, 1 epochs', 'finetune, 1 epochs', 'evaluate']
    assert [record['name'] for record in found] == names
    seconds = {r['name']: (r['compile_seconds'], r['seconds']['median']) for r in found}
    assert all(compiling <= took * 2 for compiling, took in seconds.values())
    assert seconds['pretrain, 1 epochs'][0] > 0
    assert not (base.folder / 'checkpoints').exists()


@pytest.mark.slow
def test_every_variant_of_the_step_runs(base):
    found = training.time_steps(base, ONCE, NEVER)
    assert not [record for record in found if 'failed' in record]
    assert {r['name'] for r in found} == set(training.variants(base, quick=True))
