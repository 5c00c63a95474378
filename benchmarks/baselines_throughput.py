"""A training epoch of every recipe of the house, and of RecBole's model where it has the same one.

    python -m benchmarks.baselines_throughput --dataset=toys --data_dir=DATA --peers=PYTHON \\
        --json=FILE

Recipes are the flag files of experiments/models. Ours is timed step by step after compilation, on
the recipe's own batches, each shape by itself, and summed over the batches of an epoch; what a
model computes once before an epoch (ICLRec's clusters) is left out. PYTHON is that of the peers'
environment (benchmarks/peers/README.md): RecBole trains on the very histories that ours does, in a
process of its own, between two turns of ours. Seconds are of the median step times the steps.
Targets are the terms of an epoch's losses; how many steps they take differs, and so does the work.
The ratio is of epochs, then of a target's share of them: the two BERT4Rec mask differently.
Others is the share of the processor that was not ours nor RecBole's: PyTorch suffers from it far
more than XLA does, so that a ratio measured beside other work is worth nothing.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.loss_alone import processor
from benchmarks.train_throughput import Variant, matmul_rate
from fame_jax import config as config_lib
from fame_jax import run as run_lib
from fame_jax import stages
from fame_jax.data import sequences

ROOT = Path(__file__).resolve().parents[1]
PEER_PROGRAM = ROOT / 'benchmarks' / 'peers' / 'recbole_models.py'
PEERS = {'sasrec': 'SASRec', 'gru4rec': 'GRU4Rec', 'bert4rec': 'BERT4Rec', 'core': 'CORE'}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='toys')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--recipes', type=Path, default=ROOT / 'experiments' / 'models')
    parser.add_argument('--models', default='', help='recipes by name, with commas; empty: all')
    parser.add_argument('--seconds', type=float, default=15, help='of each of our two turns')
    parser.add_argument('--peers', default='', help="the peers' python; empty: ours alone")
    parser.add_argument('--peer_batches', type=int, default=40, help='timed, of each peer')
    parser.add_argument('--peer_batch', type=int, default=256, help='prefixes in a step of a peer')
    parser.add_argument('--json', type=Path, help='where to write the figures')
    return parser.parse_args()


def recipes(arguments):
    """Names of the recipes asked for; ends the program when one is not there."""
    there = sorted(path.stem for path in arguments.recipes.glob('*.cfg'))
    names = arguments.models.split(',') if arguments.models else there
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise SystemExit(
            f'{arguments.recipes} holds no recipe {", ".join(unknown)}; '
            f'--models may name {", ".join(there)}'
        )
    return names


def prepare(arguments, folder):
    """The data, prepared once for all, as a run."""
    config = config_lib.Config(
        dataset=arguments.dataset,
        data_dir=arguments.data_dir,
        workdir=str(folder / 'data'),
        progress='none',
    )
    base = run_lib.open_run(config)
    stages.prepare(base)
    return base


def follow(name, arguments, base):
    """A recipe's run, over the data of `base`."""
    config = config_lib.parse(
        [
            f'--flagfile={arguments.recipes / name}.cfg',
            f'--dataset={arguments.dataset}',
            f'--data_dir={arguments.data_dir}',
            f'--workdir={base.folder.parent / name}',
        ]
    )
    return dataclasses.replace(base, config=config)


def write_sequences(data, path):
    """The histories as the peers read them: one user a line, `user item item ...`."""
    with path.open('w') as file:
        for user, (start, end) in enumerate(zip(data.offsets[:-1], data.offsets[1:]), 1):
            print(user, *data.items[start:end], file=file)


def time_ours(variant, seconds):
    """Steps of every shape in turn for so long; five at the least, since the first two go."""
    began, count = time.perf_counter(), 0
    while count < 5 or time.perf_counter() - began < seconds:
        variant.time_steps(1)
        count += 1
    return count


def time_peer(name, max_length, arguments, folder):
    """A peer's figures, from its own process."""
    out = folder / f'{name}.json'
    command = [arguments.peers, PEER_PROGRAM, '--model', name, '--data_dir', folder]
    command += ['--dataset', 'histories', '--batches', arguments.peer_batches]
    command += ['--batch', arguments.peer_batch, '--max_len', max_length]
    command += ['--threads', run_lib.cores(), '--json', out]
    subprocess.run([str(word) for word in command], check=True)
    return json.loads(out.read_text())


def others_seconds():
    """Seconds of processor that others than this process and its children used; 0 but on Linux."""
    if not os.path.exists('/proc/stat'):
        return 0
    with open('/proc/stat') as lines:
        user, nice, system, _, _, *interrupts_and_stolen = map(int, next(lines).split()[1:9])
    busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf('SC_CLK_TCK')
    return busy - sum(os.times()[:4])


def measure(name, arguments, base, rate):
    """Ours, theirs, ours again; the figures of one recipe."""
    run = follow(name, arguments, base)
    variant = Variant(name, run, run.config.model)
    began, others = time.perf_counter(), others_seconds()
    first = time_ours(variant, arguments.seconds)
    theirs = None
    if arguments.peers and name in PEERS:
        theirs = time_peer(PEERS[name], run.config.max_length, arguments, base.folder.parent)
    time_ours(variant, arguments.seconds)
    others = (others_seconds() - others) / (time.perf_counter() - began) / run_lib.cores()
    ours = variant.result(rate) | {
        'model': run.config.model,
        'epoch_seconds_p10_p90': [variant.epoch_seconds(p) for p in (10, 90)],
        'epoch_seconds_by_turn': [
            variant.epoch_seconds(end=first),
            variant.epoch_seconds(begin=first),
        ],
        'steps_timed': {
            'x'.join(map(str, shape[0])): len(times) for shape, times in variant.times.items()
        },
    }
    row = {'recipe': name, 'others': others, 'ours': ours}
    if theirs:
        ratio = theirs['epoch_seconds'] / ours['epoch_seconds']
        share = ours['terms_per_epoch'] / theirs['loss_terms_per_epoch']
        row |= {'recbole': theirs, 'ratio': ratio, 'ratio_per_target': ratio * share}
    return row


def table(rows):
    """Figures as Markdown."""
    lines = [
        '| recipe | s an epoch (P10 - P90) | steps | targets | parameters | '
        'RecBole s an epoch (P10 - P90) | steps | targets | parameters | ratio | a target | '
        'others |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    return '\n'.join(lines + [_line(row) for row in rows])


def _line(row):
    ours, theirs = row['ours'], row.get('recbole')
    low, high = ours['epoch_seconds_p10_p90']
    cells = [
        row['recipe'],
        f'{ours["epoch_seconds"]:.2f} ({low:.2f} - {high:.2f})',
        f'{ours["steps_per_epoch"]:,}',
        f'{ours["terms_per_epoch"]:,.0f}',
        f'{ours["parameters"]:,}',
    ]
    if theirs:
        steps = theirs['batches_per_epoch']
        low, high = (theirs[f'batch_seconds_{p}'] * steps for p in ('p10', 'p90'))
        cells += [
            f'{theirs["epoch_seconds"]:.1f} ({low:.1f} - {high:.1f})',
            f'{steps:,}',
            f'{theirs["loss_terms_per_epoch"]:,}',
            f'{theirs["parameters"]:,}',
            f'{row["ratio"]:.1f}',
            f'{row["ratio_per_target"]:.1f}',
        ]
    cells += [''] * (11 - len(cells)) + [f'{100 * row["others"]:.0f} %']
    return '| ' + ' | '.join(cells) + ' |'


def main():
    """Measures and prints."""
    arguments = parse_arguments()
    names = recipes(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(arguments, Path(folder))
        write_sequences(base.data, Path(folder) / 'histories.txt')
        rate = matmul_rate()
        rows = []
        for name in names:
            rows.append(measure(name, arguments, base, rate))
            print(_line(rows[-1]), flush=True)
        described = sequences.describe(base.data)
    about = {
        'machine': run_lib.machine() | {'processor': processor()},
        'dataset': described,
        'matmul_gflops': rate / 1e9,
    }
    print(json.dumps(about, indent=2))
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**about, 'recipes': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
