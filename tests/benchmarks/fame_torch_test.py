"""The peers: FAME in PyTorch has the same scores and gradients, and takes turns with ours."""

import argparse
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

from benchmarks import peers
from fame_jax.models import registry

PROGRAM = Path(__file__).parents[2] / 'benchmarks' / 'peers' / 'fame_torch.py'
TEMPERATURE = 0.5
SMALL = ['--width=8', '--num_experts=3', '--batch=2', '--max_len=4', '--warmup=1', '--threads=1']
# The targets are all items of a line but the first and the last two.
HISTORIES = 'u1 a b c d e f g h\nu2 b a c\nu3 c d a b\n'
TARGETS = 5 + 0 + 1


@pytest.fixture(scope='module')
def python():
    """An interpreter that has torch: this one, or that in $PEERS_PYTHON."""
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
    """A FAME with random parameters on random rows: queries, scores, loss and gradients."""
    small = {'width': 8, 'num_heads': 2, 'num_experts': 3, 'dropout': 0.0, 'max_length': 6}
    small |= {'temperature': TEMPERATURE, **options}
    module, rng = registry.make('fame', small, num_items=12), np.random.default_rng(0)
    # All parameters are random, so that biases and scales matter too.
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32),
        registry.init_params(module, jax.random.key(0)),
    )
    tokens_BL, target_B = random_rows(module.num_items, module.max_length, 14)
    segments_BL = (tokens_BL > 0).astype(np.int32)
    rows = tokens_BL, np.zeros_like(tokens_BL), segments_BL

    def loss(params):
        query_B1D, item_VD, _ = module.apply({'params': params}, *rows, last=True, method='forward')
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
    arrays = {'tokens': tokens_BL.astype(np.int64), 'targets': target_B.astype(np.int64)}
    arrays |= {'query': query_BD, 'score': score_BV, 'loss': value, 'temperature': TEMPERATURE}
    np.savez(path, **arrays, **flat)


# Heads of 4 numbers and more: a LayerNorm over 2 gives +-1, whose gradient is nothing but rounding.
@pytest.mark.parametrize(
    'options', [{'num_blocks': 2}, {'width': 16, 'num_heads': 4, 'num_blocks': 3}]
)
def test_the_same_function_and_gradients(python, tmp_path, options):
    """Both forms; the program fails where anything differs by more than 1e-4."""
    write_fame(tmp_path / 'fame.npz', **options)
    process = run(python, '--parity', tmp_path / 'fame.npz', '--threads=1')
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads(process.stdout)
    assert set(result) == {'all_positions', 'last_only'}
    assert {'query', 'score', 'loss', 'gradient'} == set(result['last_only'])


def test_turns_train_on_every_prefix_without_validation_and_test_items(python, tmp_path):
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


# Replaces the program where there is no torch: it logs its flags and its turns.
STAND_IN = """
import json, pathlib, sys
log = pathlib.Path(__file__).with_name('log').open('a')
print('flags', *sys.argv[1:], file=log)
print(json.dumps({'items': 8}), flush=True)
for line in sys.stdin:
    print('theirs', line.strip(), file=log, flush=True)
    print(json.dumps({form: {'batches_timed': int(line)} for form in 'ab'}), flush=True)
"""


class Ours:
    """Replaces our training: an epoch writes a line."""

    def __init__(self, log):
        options = {'num_experts': 5, 'width': 64, 'num_blocks': 2, 'num_heads': 2}
        options |= {'dropout': 0.5, 'temperature': 0.07}
        self.log, self.module = log, argparse.Namespace(**options)

    def epoch(self):
        with self.log.open('a') as file:
            print('ours', file=file)
        return np.zeros(1)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / 'fame_torch.py').write_text(STAND_IN)
    monkeypatch.setattr(peers, 'PROGRAMS', tmp_path)
    return peers.parse_arguments(['--peers', sys.executable, '--turns=2', '--peer_batches=5'])


def test_the_peer_and_ours_take_turns(tmp_path, arguments):
    ours = Ours(tmp_path / 'log')
    times, forms = peers.take_turns('fame', ours, arguments, tmp_path)
    assert forms == [{'peer': f'PyTorch, {form}', 'items': 8, 'batches_timed': 3} for form in 'ab']
    assert len(times) == 4
    first, flags, *rest = (tmp_path / 'log').read_text().splitlines()
    assert [first, *rest] == ['ours', 'theirs 3', 'ours', 'theirs 3', 'ours', 'ours']
    assert '--batch 256' in flags and '--num_experts=5' in flags and '--turns' in flags


def test_a_peer_that_fails_ends_the_program(tmp_path, arguments):
    (tmp_path / 'fame_torch.py').write_text('raise SystemExit(3)')
    with pytest.raises(SystemExit, match='ended with code 3'):
        peers.take_turns('fame', Ours(tmp_path / 'log'), arguments, tmp_path)


def test_ratios_are_of_epochs_and_of_targets():
    ours = {'seconds': {'median': 2.0}, 'targets': 10.0}
    result = peers.ratios(ours, {'epoch_seconds': 8.0, 'loss_terms_per_epoch': 20})
    assert result == {'ratio': 8 / 2, 'ratio_per_target': 8 / 20 / (2 / 10)}


def test_our_model_is_timed_without_peers_on_a_sequence_file(monkeypatch, tmp_path, capsys):
    """Every prefix but those of the last two items is a target; the table has a row a model."""
    rows = [f'u{u} ' + ' '.join(f'i{(u * k) % 7}' for k in range(1, 8)) for u in range(1, 31)]
    (tmp_path / 'small.txt').write_text('\n'.join(rows) + '\n')
    out = tmp_path / 'peers.json'
    flags = [f'--dataset={tmp_path / "small.txt"}', '--models=sasrec', f'--out={out}']
    peers.main(flags)
    (row,) = json.loads(out.read_text())['models']
    assert row['model'] == 'sasrec' and row['peers'] == []
    assert row['ours']['targets'] == len(rows) * (7 - 2 - 1) and row['ours']['n'] == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith('| sasrec | ')
