"""FAME in PyTorch, with which speed is compared: of the same equations, targets and gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sasrec_test import make_model

from benchmarks import baselines_throughput
from fame_jax.config import Config

PROGRAM = Path(__file__).parents[1] / 'benchmarks' / 'peers' / 'fame_torch.py'
TEMPERATURE = 0.5
SMALL = ['--width=8', '--num_experts=3', '--batch=2', '--max_len=4', '--warmup=1', '--threads=1']
# Prefixes of at most 4 items and what follows them, but for the last two items of each line.
HISTORIES = 'u1 a b c d e f g h\nu2 b a c\nu3 c d a b\n'
TARGETS = 5 + 0 + 1


@pytest.fixture(scope='module')
def python():
    """An interpreter that has torch: this one, or what $PEERS_PYTHON names."""
    if 'PEERS_PYTHON' not in os.environ:
        pytest.importorskip('torch')
    return os.environ.get('PEERS_PYTHON', sys.executable)


def run(python, *arguments, **options):
    """The program's process, ended."""
    return subprocess.run([python, PROGRAM, *arguments], capture_output=True, text=True, **options)


def random_rows(num_items, length, count):
    """Histories of every length, each at its row's end."""
    rng = np.random.default_rng(1)
    tokens_BL = rng.integers(1, num_items + 1, (count, length), dtype=np.int32)
    for row, tokens_L in enumerate(tokens_BL):
        tokens_L[: length - 1 - row % length] = 0
    return tokens_BL, rng.integers(1, num_items + 1, count, dtype=np.int32)


def write_fame(path, **options):
    """A FAME with random parameters on random rows: what it says, and its gradients."""
    module, params = make_model('fame', temperature=TEMPERATURE, **options)
    tokens_BL, target_B = random_rows(module.num_items, module.max_length, 14)
    segments_BL = (tokens_BL > 0).astype(np.int32)
    rows = tokens_BL, np.zeros_like(tokens_BL), segments_BL

    def loss(params):
        query_B1D, item_VD = module.apply(
            {'params': params}, *rows, last=True, method='query_and_items'
        )
        score_BV = query_B1D[:, 0] @ item_VD[1:].T
        log_BV = jax.nn.log_softmax(score_BV)
        picked_B = log_BV[jnp.arange(len(target_B)), target_B - 1]
        return -picked_B.mean(), (query_B1D[:, 0], score_BV)

    (value, (query_BD, score_BV)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params
    )
    flat = {
        f'{kind}/{name}': np.asarray(x)
        for kind, tree in (('parameter', params), ('gradient', gradient))
        for name, x in flax.traverse_util.flatten_dict(tree, sep='/').items()
    }
    held = {'tokens': tokens_BL.astype(np.int64), 'targets': target_B.astype(np.int64)}
    held |= {'query': query_BD, 'score': score_BV, 'loss': value, 'temperature': TEMPERATURE}
    np.savez(path, **held, **flat)


# Heads of 4 numbers and more: a LayerNorm over 2 gives +-1, whose gradient is rounding alone.
@pytest.mark.parametrize(
    'options', [{'num_blocks': 2}, {'width': 16, 'num_heads': 4, 'num_blocks': 3}]
)
def test_the_same_function_and_gradients(python, tmp_path, options):
    """Both forms; the program fails where anything differs by more than 1e-4."""
    write_fame(tmp_path / 'fame.npz', **options)
    process = run(python, '--parity', tmp_path / 'fame.npz', '--threads=1')
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads(process.stdout)
    assert set(found) == {'all_positions', 'last_only'}
    assert {'query', 'score', 'loss', 'gradient'} == set(found['last_only'])


def test_turns_train_on_every_prefix_but_of_what_is_held_out(python, tmp_path):
    (tmp_path / 'a.txt').write_text(HISTORIES)
    where = ['--data_dir', tmp_path, '--dataset=a']
    process = run(python, *SMALL, *where, '--turns', input='3\n4\n')
    assert process.returncode == 0, process.stderr
    about, first, second = map(json.loads, process.stdout.splitlines())
    assert about['targets_per_epoch'] == TARGETS and about['items'] == 8
    assert not about['anomaly_detection'] and about['settings']['num_experts'] == 3
    for form in ('all_positions', 'last_only'):
        assert first[form]['batches_timed'] == 3 and second[form]['batches_timed'] == 7
        figures = second[form]
        assert figures['batches_per_epoch'] == 3
        assert figures['epoch_seconds'] == pytest.approx(3 * figures['batch_seconds_median'])


# Stands in for the program where there is no torch: it writes down its flags and its turns.
STAND_IN = """
import json, pathlib, sys
diary = pathlib.Path(__file__).with_name('diary').open('a')
print('flags', *sys.argv[1:], file=diary)
print(json.dumps({'items': 8}), flush=True)
for line in sys.stdin:
    print('theirs', line.strip(), file=diary, flush=True)
    print(json.dumps({form: {'batches_timed': int(line)} for form in 'ab'}), flush=True)
"""


class Ours:
    """A variant of which every step takes two seconds; three make an epoch."""

    def __init__(self, diary):
        self.diary, self.times, self.batches = diary, {'shape': []}, {'shape': [None] * 3}

    def take_turn(self, seconds):
        with self.diary.open('a') as file:
            print('ours', seconds, file=file)
        self.times['shape'] += [2.0]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / 'fame_torch.py').write_text(STAND_IN)
    monkeypatch.setattr(baselines_throughput, 'PROGRAMS', tmp_path)
    flags = ['--peers', sys.executable, '--turns=2', '--peer_batches=5', '--seconds=7']
    monkeypatch.setattr(sys, 'argv', ['', *flags])
    return baselines_throughput.parse_arguments()


def test_the_peer_and_ours_take_turns(tmp_path, arguments):
    ours = Ours(tmp_path / 'diary')
    found = baselines_throughput.take_turns(
        ours, 'fame', Config(num_experts=5, max_length=9), arguments, tmp_path
    )
    about = [{'peer': f'PyTorch, {form}', 'items': 8, 'batches_timed': 3} for form in 'ab']
    assert found == ([6.0, 6.0, 6.0], about)
    first, flags, *rest = (tmp_path / 'diary').read_text().splitlines()
    assert [first, *rest] == ['ours 7.0', 'theirs 3', 'ours 7.0', 'theirs 3', 'ours 7.0']
    assert '--max_len 9' in flags and '--num_experts=5' in flags and '--turns' in flags


def test_a_peer_that_fails_ends_the_program(tmp_path, arguments):
    (tmp_path / 'fame_torch.py').write_text('raise SystemExit(3)')
    with pytest.raises(SystemExit, match='ended with code 3'):
        baselines_throughput.take_turns(
            Ours(tmp_path / 'diary'), 'fame', Config(), arguments, tmp_path
        )


def test_ratios_are_of_epochs_and_of_targets():
    ours = {'epoch_seconds': 2.0, 'epoch_seconds_p10_p90': [1.0, 3.0], 'terms_per_epoch': 10.0}
    theirs = {'epoch_seconds': 8.0, 'batch_seconds_p10': 0.5, 'batches_per_epoch': 6}
    found = baselines_throughput.ratios(ours, theirs | {'loss_terms_per_epoch': 20})
    assert found == {
        'ratio': 8 / 2,
        'ratio_p10': 0.5 * 6 / 1,
        'ratio_per_target': 8 / 20 / (2 / 10),
    }
