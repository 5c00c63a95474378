"""The loop: early stopping, the best epoch, checkpoints; with a made-up step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax.errors import UserError
from fame_jax.run_dir import Metrics
from fame_jax.screen import Screen
from fame_jax.training import loop, step
from fame_jax.training.checkpoint import Checkpoints
from fame_jax.training.log import Log
from fame_jax.training.optimizer import make_optimizer
from fame_jax.training.prefetch import Prefetch
from fame_jax.training.profile import Profile


class MadeUpProgram:
    """Takes losses from a list; a parameter counts the steps."""

    size = 1

    def __init__(self, losses):
        self.losses = iter(losses)

    def __call__(self, state, batches, key):
        params = {'w': state.params['w'] + 1}
        sums = {'loss': [next(self.losses), 0], 'weight': [1, 0], 'extra': [0.5, 0]}
        state = state._replace(step=state.step + 1, params=params)
        return state, {name: np.array(values) for name, values in sums.items()}

    def pop_compile_seconds(self):
        return 0.0


class Batches:
    """An epoch of `count` batches, with Grain's two methods."""

    def __init__(self, count):
        self.count, self.next_index = count, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.next_index == self.count:
            raise StopIteration
        self.next_index += 1
        return self.next_index

    def get_state(self):
        return {'next_index': self.next_index}

    def set_state(self, state):
        self.next_index = state['next_index']


def fit(
    folder,
    losses,
    validation,
    *,
    epochs=10,
    patience=2,
    steps=1,
    before_epoch=lambda params, epoch: params,
    checkpoint_seconds=0.0,
    select_on='ndcg@20',
    ema=0.0,
    judged=None,
):
    """The loop with losses and validation scores from lists, masked or (masked, unmasked)."""
    scores = (score if isinstance(score, tuple) else (score, 0.0) for score in validation)
    names = ('ndcg@20', 'unmasked/ndcg@20')
    others = {'hr@10': 0.0, 'unmasked/hr@10': 0.0}

    def validate(params):
        if judged is not None:
            judged.append(params['w'].tolist())
        return dict(zip(names, next(scores))) | others

    with Checkpoints(folder / 'checkpoints') as checkpoints:
        return loop.fit(
            state=step.init_state({'w': jnp.zeros(2)}, make_optimizer(1e-3, ema=ema), None),
            program=MadeUpProgram(losses),
            key=jax.random.key(0),
            epochs=lambda epoch: loop.Epoch(Batches(steps), steps, steps),
            before_epoch=before_epoch,
            validate=validate,
            limits=loop.Limits(epochs, patience, checkpoint_seconds),
            checkpoints=checkpoints,
            log=Log('pretrain', Metrics(folder / 'metrics.jsonl'), Screen('none')),
            profile=Profile(''),
            data_sha256='same',
            machine={},
            select_on=select_on,
        )


def lines(folder, split):
    text = (folder / 'metrics.jsonl').read_text().splitlines()
    return [line for line in map(json.loads, text) if line['split'] == split]


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path):
    """The made-up steps move the parameters to 1, 2, 3, and leave the average at its start."""
    for ema, expected in ((0.0, [0, 1, 2, 3]), (0.5, [0, 0, 0, 0])):
        judged = []
        best, progress = fit(
            tmp_path / str(ema),
            [1, 1, 1],
            [0.1, 0.2, 0.4, 0.3],
            epochs=3,
            ema=ema,
            judged=judged,
        )
        assert judged == [[value, value] for value in expected]
        assert progress.best_epoch == 2
        assert best['w'].tolist() == [expected[2]] * 2


def test_patience_counts_epochs_without_a_better_score(tmp_path):
    """Epoch 2 is the best; epochs 3 and 4 are not better, so two is the patience that ends it."""
    best, progress = fit(tmp_path, [1] * 9, [0.0, 0.1, 0.3, 0.2, 0.3, 0.9])
    assert (progress.best_epoch, progress.best_value, progress.epoch) == (2, 0.3, 4)
    assert progress.finished
    assert best['w'].tolist() == [2, 2]  # the parameters after two steps, not after four
    scores = [line['ndcg@20'] for line in lines(tmp_path, 'validation')]
    assert scores == [0.0, 0.1, 0.3, 0.2, 0.3]
    assert [line['epoch'] for line in lines(tmp_path, 'train')] == [1, 2, 3, 4]


def test_a_longer_patience_goes_on(tmp_path):
    _, progress = fit(tmp_path, [1] * 9, [0.0, 0.1, 0.3, 0.2, 0.3, 0.9], epochs=5, patience=3)
    assert (progress.best_epoch, progress.epoch) == (5, 5)


def test_the_initial_parameters_can_be_the_best(tmp_path):
    best, progress = fit(tmp_path, [1] * 9, [0.5, 0.1, 0.2], patience=2)
    assert (progress.best_epoch, progress.epoch) == (0, 2)
    assert best['w'].tolist() == [0, 0]


def test_losses_are_means_over_weights_and_metrics_over_steps(tmp_path):
    fit(tmp_path, [1.0, 2.0, 6.0], [0.0, 0.1], epochs=1, steps=3)
    (line,) = lines(tmp_path, 'train')
    assert (line['loss'], line['extra'], line['step']) == ((1 + 2 + 6) / 3, 0.5, 3)


def test_parameters_are_updated_before_each_epoch(tmp_path):
    epochs = []

    def before_epoch(params, epoch):
        epochs.append(epoch)
        return {'w': params['w'] + 10}

    best, _ = fit(tmp_path, [1] * 3, [0.0, 0.1, 0.2, 0.3], epochs=3, before_epoch=before_epoch)
    assert epochs == [0, 1, 2]
    assert best['w'].tolist() == [3 * (10 + 1)] * 2


@pytest.mark.parametrize(
    'seconds, saved',
    [(0, [0, 1, 2, 3, 4, 5, 6]), (1000, [0, 6])],
    ids=['after every step', 'first and last'],
)
def test_checkpoints_are_some_seconds_apart(seconds, saved, tmp_path, monkeypatch):
    steps, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, 'save', lambda self, step, *rest: (steps.append(step), save(self, step, *rest))
    )
    scores = [0.0, 0.3, 0.2, 0.1]
    fit(tmp_path, [1] * 6, scores, epochs=3, steps=2, patience=9, checkpoint_seconds=seconds)
    assert steps == saved


def test_a_finished_stage_is_restored_as_it_ended(tmp_path):
    best, progress = fit(tmp_path, [1] * 3, [0.0, 0.3, 0.2, 0.1])
    again, same = fit(tmp_path, [], [])
    assert (again['w'].tolist(), same) == (best['w'].tolist(), progress)


@pytest.mark.parametrize('more', [{'patience': 3}, {'patience': 9, 'epochs': 5}])
def test_a_finished_stage_goes_on_under_larger_limits(more, tmp_path):
    """As if it had had them from the start; it had ended in epoch 4."""
    scores = [0.0, 0.1, 0.3, 0.2, 0.3, 0.9]
    fit(tmp_path / 'grown', [1] * 4, scores[:5])
    best, progress = fit(tmp_path / 'grown', [1], scores[5:], **{'epochs': 5} | more)
    other, whole = fit(tmp_path / 'whole', [1] * 5, scores, **{'epochs': 5} | more)
    assert best['w'].tolist() == other['w'].tolist() == [5, 5]
    assert dataclasses.replace(progress, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert lines(tmp_path / 'grown', 'validation') == lines(tmp_path / 'whole', 'validation')


def test_larger_limits_that_did_not_end_a_stage_change_nothing(tmp_path):
    best, progress = fit(tmp_path, [1] * 4, [0.0, 0.1, 0.3, 0.2, 0.3])
    again, same = fit(tmp_path, [], [], epochs=99)
    assert (again['w'].tolist(), same) == (best['w'].tolist(), progress)


def test_a_failure_inside_an_epoch_resumes_after_the_last_saved_step(tmp_path):
    """The third of four losses fails; the second run begins there, with the sums of the first."""
    with pytest.raises(UserError, match='the loss is nan'):
        fit(tmp_path, [1.0, 2.0, float('nan')], [0.0], epochs=1, steps=4)
    best, progress = fit(tmp_path, [4.0, 5.0], [0.4], epochs=1, steps=4)
    (line,) = lines(tmp_path, 'train')
    assert line['loss'] == (1 + 2 + 4 + 5) / 4
    assert (progress.step, progress.best_value, best['w'].tolist()) == (4, 0.4, [4, 4])


def test_no_epochs_leave_the_initial_parameters(tmp_path):
    best, progress = fit(tmp_path, [], [0.5], epochs=0)
    assert (progress.epoch, progress.best_epoch, progress.best_value) == (0, 0, 0.5)
    assert progress.finished and best['w'].tolist() == [0, 0]


@pytest.mark.parametrize('loss', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_is_an_error_with_its_step(loss, tmp_path):
    with pytest.raises(UserError, match='step 2'):
        fit(tmp_path, [1, loss], [0.0, 0.1])


def test_a_score_that_is_not_finite_is_an_error(tmp_path):
    def scores():
        yield 0.1
        raise FloatingPointError('a score is NaN')

    with pytest.raises(UserError, match='NaN after step 1; lower the learning rate'):
        fit(tmp_path, [1], scores())


def test_prefetch_lays_out_each_epoch_once_and_in_order():
    made = []

    def make_epoch(epoch):
        made.append(epoch)
        return loop.Epoch(Batches(2), 2, 2)

    prefetch = Prefetch(make_epoch)
    assert prefetch.peek(0) == prefetch.peek(0) == (1, 2)
    assert [list(prefetch(epoch).batches) for epoch in range(3)] == [[1, 2]] * 3
    prefetch(3)
    assert sorted(made)[:4] == [0, 1, 2, 3] and len(set(made)) == len(made)


# Masked and unmasked scores before the first step and after each epoch.
BOTH = [(0.0, 0.05), (0.1, 0.1), (0.3, 0.2), (0.2, 0.95), (0.1, 0.4), (0.1, 0.3)]


@pytest.mark.parametrize('select_on, best, epochs', [('ndcg@20', 2, 4), ('unmasked/ndcg@20', 3, 5)])
def test_the_chosen_ranking_selects_the_best_epoch_and_ends_the_stage(
    select_on, best, epochs, tmp_path
):
    params, progress = fit(tmp_path, [1] * 9, BOTH, select_on=select_on)
    assert (progress.best_epoch, progress.epoch, progress.select_on) == (best, epochs, select_on)
    assert params['w'].tolist() == [best, best]
    assert progress.best_value == BOTH[best]['/' in select_on]
    logged = lines(tmp_path, 'validation')
    assert [(line['ndcg@20'], line['unmasked/ndcg@20']) for line in logged] == BOTH[: epochs + 1]


def test_a_stage_goes_on_by_the_ranking_with_which_it_began(tmp_path):
    with pytest.raises(UserError, match='the loss is nan'):
        fit(tmp_path, [1, 1, float('nan')], BOTH, select_on='unmasked/ndcg@20')
    _, progress = fit(tmp_path, [1] * 9, BOTH[3:])
    assert (progress.best_epoch, progress.best_value) == (3, 0.95)
    assert progress.select_on == 'unmasked/ndcg@20'
