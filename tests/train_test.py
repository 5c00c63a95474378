"""The loop, and what is compiled beside it."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs_test import first_step

from fame_jax import config as config_lib
from fame_jax import programs, records, stages, train
from fame_jax import run as run_lib
from fame_jax.checkpoint import Checkpoints
from fame_jax.data import sequences
from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.profile import Profile
from fame_jax.screen import Screen


def test_a_stage_compiles_its_step_once(tmp_path):
    """Batches have one shape from the first to the last, ragged one."""
    config = config_lib.Config(
        workdir=str(tmp_path), synthetic_users=60, width=8, rows_per_step=3, progress='none'
    )
    run = run_lib.open_run(config)
    stages.prepare(run)
    step, state = first_step('sasrec', config, run.data.num_items)
    for epoch in range(2):
        for batch in stages.epochs_of(run, 'pretrain')(epoch).batches:
            state, _ = step(state, batch, jax.random.key(0))
    assert step.func._cache_size() == 1


TINY_RUN = [
    *('--synthetic_users=60', '--synthetic_items=30', '--width=8', '--num_blocks=1'),
    *('--rows_per_step=2', '--num_experts=2', '--progress=none', '--k_core=0'),
    *('--pretrain_epochs=1', '--finetune_epochs=1'),
]


def test_stages_to_come_are_compiled_while_others_run(tmp_path, monkeypatch):
    """Each step once, and none by the stage itself; so are the ranks of the second stage."""
    compiled = []
    compile_step, compile_ranks = programs.Program.compile, run_lib.Ranker.compile

    def watch_step(self, state, batch, key):
        before = len(self._compiled)
        program = compile_step(self, state, batch, key)
        if len(self._compiled) > before:
            compiled.append(('step', threading.current_thread().name))
        return program

    def watch_ranks(self, split):
        before = len(self._programs)
        compile_ranks(self, split)
        if len(self._programs) > before:
            compiled.append(('ranks', threading.current_thread().name))

    monkeypatch.setattr(programs.Program, 'compile', watch_step)
    monkeypatch.setattr(run_lib.Ranker, 'compile', watch_ranks)
    run = run_lib.open_run(config_lib.parse([*TINY_RUN, f'--workdir={tmp_path}']))
    stages.prepare(run)
    stages.compile_ahead(run)
    run.ahead.shutdown(wait=True)
    assert compiled == [('step', 'ahead_0'), ('step', 'ahead_0'), ('ranks', 'ahead_0')]
    for stage in ('pretrain', 'finetune', 'evaluate'):
        stages.STAGES[stage](run)
    assert compiled[3:] == [('ranks', 'MainThread')]  # the first stage's, which nobody waits for


def test_nothing_is_compiled_for_a_stage_that_is_finished(tmp_path):
    flags = [*TINY_RUN, f'--workdir={tmp_path}']
    assert main(flags) == 0
    run = run_lib.open_run(config_lib.parse(flags))
    stages.compile_ahead(run)
    assert run.plans == {}


def test_what_fails_to_compile_is_told_by_its_stage(tmp_path, monkeypatch):
    """And not by the thread, which nobody reads."""

    def fail(self, state, batch, key):
        raise NotImplementedError('no such step')

    run = run_lib.open_run(config_lib.parse([*TINY_RUN, f'--workdir={tmp_path}']))
    monkeypatch.setattr(programs.Program, 'compile', fail)
    stages.prepare(run)
    with pytest.raises(NotImplementedError, match='no such step'):
        stages.pretrain(run)


@pytest.mark.parametrize(
    'size, every, blocks', [(4, 0, [4, 4, 4]), (4, 6, [4, 2, 4]), (4, 3, [3] * 3)]
)
def test_a_block_ends_where_a_checkpoint_is_due(size, every, blocks):
    program, done = programs.Program(len, size), 0
    for block in blocks:
        assert train.until_save(done, program, train.Limits(1, 1, every)) == block
        done += block


def test_nothing_is_compiled_after_the_first_epoch(tmp_path, monkeypatch):
    """Of a stage, that is; counted by jax itself, in whatever part of the program."""
    compiled, at_epoch = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
    )
    append = records.Metrics.append

    def count(self, **line):
        at_epoch.append((line.get('stage'), line.get('epoch'), len(compiled)))
        append(self, **line)

    monkeypatch.setattr(records.Metrics, 'append', count)
    flags = '--synthetic_users=90 --synthetic_items=30 --width=8 --num_blocks=1 --pretrain_epochs=4'
    flags += ' --rows_per_step=2 --progress=none --finetune_epochs=4 --num_experts=2'
    try:
        assert main([*flags.split(), f'--workdir={tmp_path}']) == 0
    finally:
        jax.monitoring.clear_event_listeners()
    for stage in ('pretrain', 'finetune'):
        counts = [number for name, epoch, number in at_epoch if name == stage and epoch > 1]
        assert len(counts) == 2 * 3 and len(set(counts)) == 1 and counts[0] > 0


def fit(
    tmp_path,
    losses,
    validation,
    epochs=10,
    patience=2,
    refresh=lambda params, epoch: params,
    checkpoint_seconds=0.0,
):
    """The loop with a make-believe step: loss and validation come from lists."""
    losses, validation = iter(losses), iter(validation)

    class Program:
        size = 1

        def __call__(self, state, batches, key):
            return state._replace(step=state.step + 1), np.array([[next(losses), 1]])

        def compile(self, state, batch, key):
            pass

        def compiling(self):
            return 0.0

    class Batches:
        def __init__(self):
            self.left = 1

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            self.left -= 1

        def get_state(self):
            return {'next_index': 1 - self.left}

    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        return train.fit(
            stage='pretrain',
            state=programs.begin({'w': jnp.zeros(2)}, optax.adam(1e-3), None),
            program=Program(),
            key=jax.random.key(0),
            epoch_of=lambda epoch: train.Epoch(Batches(), 1, 1),
            refresh=refresh,
            validate=lambda params: {'ndcg@20': next(validation), 'hr@10': 0.0},
            limits=train.Limits(epochs, patience, 0, checkpoint_seconds),
            checkpoints=checkpoints,
            metrics=records.Metrics(tmp_path / 'metrics.jsonl'),
            screen=Screen('none'),
            scalars=lambda *_: None,
            data_sha256='same',
            machine={},
            profile=Profile(''),
        )


def test_patience_counts_epochs_without_a_better_validation(tmp_path):
    _, progress = fit(tmp_path, [1] * 9, [0.0, 0.1, 0.3, 0.2, 0.3, 0.9])
    assert (progress.best_epoch, progress.best_value, progress.epoch) == (2, 0.3, 4)
    assert progress.finished
    lines = [json.loads(x) for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [x['ndcg@20'] for x in lines if x['split'] == 'validation'] == [0.0, 0.1, 0.3, 0.2, 0.3]
    assert [x['epoch'] for x in lines if x['split'] == 'train'] == [1, 2, 3, 4]


def test_what_no_gradient_moves_is_refreshed_before_each_epoch(tmp_path):
    seen = []

    def refresh(params, epoch):
        seen.append(epoch)
        return {'w': params['w'] + 1}

    best, _ = fit(tmp_path, [1] * 3, [0.0, 0.1, 0.2, 0.3], epochs=3, refresh=refresh)
    assert seen == [0, 1, 2]
    assert best['w'].tolist() == [3, 3]


@pytest.mark.parametrize(
    'seconds, saved', [(0, [0, 1, 2, 3]), (1000, [0, 3])], ids=['each', 'first and last']
)
def test_an_epoch_too_short_to_be_saved_leaves_no_checkpoint(seconds, saved, tmp_path, monkeypatch):
    steps, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, 'save', lambda self, step, *rest: (steps.append(step), save(self, step, *rest))
    )
    fit(tmp_path, [1] * 3, [0.0, 0.3, 0.2, 0.1], epochs=3, checkpoint_seconds=seconds)
    assert steps == saved


def test_no_epochs_leave_what_it_started_from(tmp_path):
    _, progress = fit(tmp_path, [], [0.5], epochs=0)
    assert (progress.epoch, progress.best_epoch, progress.best_value) == (0, 0, 0.5)
    assert progress.finished


@pytest.mark.parametrize('loss', [float('nan'), float('inf')])
def test_a_loss_that_is_no_number_is_told_with_its_step(loss, tmp_path):
    with pytest.raises(UserError, match='step 2'):
        fit(tmp_path, [1, loss], [0.0, 0.1])


def make_world(folder, histories):
    """A hand-made data set in a run's folder."""
    num_items = max(max(history) for history in histories)
    items = np.concatenate(histories).astype(np.int32)
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    ids = [str(i) for i in range(1, num_items + 1)]
    users = [str(u) for u in range(len(histories))]
    sequences.save(
        sequences.Sequences(items, offsets, users, ['', *ids], {'name': 'hand-made'}),
        folder / 'dataset',
    )


def test_a_tiny_world_is_learned_by_heart(tmp_path):
    """Everybody walks round the same ring of forty items; only where he starts differs."""
    make_world(tmp_path, [[(2 * u + i) % 40 + 1 for i in range(8)] for u in range(20)])
    flags = ['--width=16', '--num_experts=2', '--dropout=0', '--rows_per_step=2', '--patience=60']
    flags += ['--max_length=8', '--row_length=8', '--learning_rate=0.01']
    flags += ['--pretrain_epochs=25', '--finetune_epochs=5']
    assert main([*flags, f'--workdir={tmp_path}', '--progress=none']) == 0
    ranks = np.load(tmp_path / 'ranks.npz')
    for stage in ('pretrain', 'finetune'):
        assert np.mean(ranks[f'{stage}/test/masked'] == 1) >= 0.9


def test_fame_beats_popularity_by_far_where_facets_are_planted(tmp_path):
    """And the report of heads against facets is there, whatever it says."""
    flags = ['--synthetic_users=800', '--synthetic_items=200', '--width=32', '--num_experts=4']
    flags += ['--pretrain_epochs=12', '--finetune_epochs=4', '--learning_rate=0.003']
    assert main([*flags, f'--workdir={tmp_path}', '--progress=none']) == 0
    results = json.loads((tmp_path / 'results.json').read_text())['results']
    floor = results['popularity']['test']['masked']['ndcg@10']
    assert results['finetune']['test']['masked']['ndcg@10'] > 1.5 * floor
    facets = results['finetune']['facets']
    assert np.array(facets['neighbours']).shape == (2, 2)
    assert sorted(head for head, _ in facets['matching']) == [0, 1]
    assert facets['matched'] >= facets['unmatched']


def test_results_carry_the_protocol_card(tmp_path):
    make_world(tmp_path, [[(u + i) % 10 + 1 for i in range(6)] for u in range(10)])
    flags = ['--model=sasrec', '--width=8', '--stages=prepare,pretrain,evaluate']
    flags += ['--pretrain_epochs=1', f'--workdir={tmp_path}', '--progress=none']
    assert main(flags) == 0
    card = json.loads((tmp_path / 'results.json').read_text())['card']
    assert card['dataset']['users'] == 10 and card['dataset']['items'] == 10
    assert len(card['dataset']['fingerprint']) == 64
    assert {'split', 'masked', 'unmasked', 'ties', 'selection', 'seed', 'config'} <= set(card)
    stage = card['stages']['pretrain']
    for where in (stage['machine'], card['judged_on']):
        assert {'jax', 'flax', 'optax'} <= set(where['versions'])
    assert stage['seconds'] > 0 and card['judged_on']['peak_memory_bytes'] > 0
