"""A training epoch of every recipe, beside the same model in PyTorch where there is one.

    python -m benchmarks.baselines_throughput --dataset=toys --data_dir=DATA --peers=PYTHON \\
        --json=FILE

Recipes are the flag files of experiments/models. Ours is timed dispatch by dispatch, as the trainer
has it, after compilation, on the recipe's own batches, each shape by itself, and summed over the
batches of an epoch; what a model computes once before an epoch (ICLRec's clusters) is left out.
PYTHON is that of the peers' environment (benchmarks/peers/README.md): a peer trains on the very
histories that ours does, in a process of its own. RecBole's models do so between two turns of ours;
fame_torch.py, in both of its forms, in --turns turns with ours. Seconds are of the median step
times the steps.
Targets are the terms of an epoch's losses; how many steps they take differs, and so does the work.
The ratio is of epochs, then of a target's share of them: the two BERT4Rec mask differently.
Others is the share of the processor that was not ours nor a peer's: PyTorch suffers from it far
more than XLA does, so that a ratio measured beside other work is worth nothing.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.machine import processor
from benchmarks.roofline import matmul_rate
from benchmarks.train_throughput import Variant
from fame_jax import config as config_lib
from fame_jax import run as run_lib
from fame_jax import stages
from fame_jax.data import sequences

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / 'benchmarks' / 'peers'
RECBOLE = {'sasrec': 'SASRec', 'gru4rec': 'GRU4Rec', 'bert4rec': 'BERT4Rec', 'core': 'CORE'}
# Of a config, flags of fame_torch.py. Another choice of the recipe has no like there.
FAME_FIELDS = ('width', 'num_blocks', 'num_heads', 'num_experts', 'dropout', 'temperature')


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='toys')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--recipes', type=Path, default=ROOT / 'experiments' / 'models')
    parser.add_argument('--models', default='', help='recipes by name, with commas; empty: all')
    parser.add_argument('--seconds', type=float, default=15, help='of each of our turns')
    parser.add_argument('--peers', default='', help="the peers' python; empty: ours alone")
    parser.add_argument('--peer_batches', type=int, default=40, help='timed, of each peer')
    parser.add_argument('--peer_batch', type=int, default=256, help='prefixes in a step of a peer')
    parser.add_argument(
        '--as_it_comes', action='store_true', help='with the anomaly detection RecBole leaves on'
    )
    parser.add_argument('--turns', type=int, default=4, help='of fame_torch.py, among ours')
    parser.add_argument('--compile_peer', action='store_true', help='fame_torch.py compiled')
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


def peer_command(program, config, arguments, folder):
    """What every peer is told: the histories, their length and the size of a batch."""
    command = [arguments.peers, PROGRAMS / program, '--data_dir', folder, '--dataset', 'histories']
    command += ['--batch', arguments.peer_batch, '--max_len', config.max_length]
    return [str(word) for word in [*command, '--threads', run_lib.cores()]]


def time_recbole(name, config, arguments, folder):
    """RecBole's figures, from a process that ends."""
    out = folder / f'{name}.json'
    command = peer_command('recbole_models.py', config, arguments, folder)
    command += ['--model', name, '--batches', str(arguments.peer_batches), '--json', str(out)]
    command += ['--as_it_comes'] * arguments.as_it_comes
    subprocess.run(command, check=True)
    return {'peer': 'RecBole', **json.loads(out.read_text())}


class TorchFame:
    """fame_torch.py, alive between its turns and idle in ours."""

    def __init__(self, config, arguments, folder):
        command = peer_command('fame_torch.py', config, arguments, folder)
        command += [f'--{name}={getattr(config, name)}' for name in FAME_FIELDS]
        command += ['--turns', *['--compile'] * arguments.compile_peer]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.about = self.read()  # once it is warm

    def read(self):
        """Its next line; ends the program when there is none."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f'fame_torch.py ended with code {self.process.wait()}')
        return json.loads(line)

    def take_turn(self, batches):
        """So many batches of each form; the figures of all of its turns."""
        print(batches, file=self.process.stdin, flush=True)
        forms = self.read()
        return [
            {'peer': f'PyTorch, {form}', **self.about, **found} for form, found in forms.items()
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def take_turns(variant, name, config, arguments, folder):
    """Ours, theirs, ours again and so on. Returns an epoch of each turn of ours, and the peers."""
    epochs, peers = [time_ours(variant, arguments.seconds)], []
    if arguments.peers and name in RECBOLE:
        peers = [time_recbole(RECBOLE[name], config, arguments, folder)]
    elif arguments.peers and name == 'fame':
        with TorchFame(config, arguments, folder) as fame:
            for turn in range(1, arguments.turns + 1):
                peers = fame.take_turn(-(-arguments.peer_batches // arguments.turns))
                if turn < arguments.turns:
                    epochs.append(time_ours(variant, arguments.seconds))
    return [*epochs, time_ours(variant, arguments.seconds)], peers


def time_ours(variant, seconds):
    """A turn. Returns seconds of an epoch by it."""
    before = {shape: len(times) for shape, times in variant.times.items()}
    variant.take_turn(seconds)
    return sum(
        len(variant.batches[shape]) * statistics.median(times[before[shape] :])
        for shape, times in variant.times.items()
    )


def others_seconds():
    """Seconds of processor that others than this process and its children used; 0 but on Linux."""
    if not os.path.exists('/proc/stat'):
        return 0
    with open('/proc/stat') as lines:
        user, nice, system, _, _, *interrupts_and_stolen = map(int, next(lines).split()[1:9])
    busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf('SC_CLK_TCK')
    return busy - sum(os.times()[:4])


def measure(name, arguments, base):
    """Ours and theirs in turns; the figures of one recipe."""
    run = follow(name, arguments, base)
    variant = Variant(name, run, run.config.model)
    began, others = time.perf_counter(), others_seconds()
    epochs, peers = take_turns(variant, name, run.config, arguments, base.folder.parent)
    others = (others_seconds() - others) / (time.perf_counter() - began) / run_lib.cores()
    ours = variant.record() | {
        'model': run.config.model,
        'epoch_seconds_p10_p90': [variant.epoch_seconds(p) for p in (10, 90)],
        'epoch_seconds_by_turn': epochs,
        'dispatches_timed': {
            'x'.join(map(str, shape[0])): len(times) for shape, times in variant.times.items()
        },
    }
    peers = [peer | ratios(ours, peer) for peer in peers]
    return {'recipe': name, 'others': others, 'ours': ours, 'peers': peers}


def ratios(ours, theirs):
    """A peer's time in ours: an epoch by medians and by P10, and a target's share of one."""
    ratio = theirs['epoch_seconds'] / ours['epoch_seconds']
    p10 = theirs['batch_seconds_p10'] * theirs['batches_per_epoch']
    return {
        'ratio': ratio,
        'ratio_p10': p10 / ours['epoch_seconds_p10_p90'][0],
        'ratio_per_target': ratio * ours['terms_per_epoch'] / theirs['loss_terms_per_epoch'],
    }


def table(rows):
    """Figures as Markdown, a line for each peer."""
    lines = [
        '| recipe | s an epoch (P10 - P90) | steps | targets | parameters | others | peer | '
        's an epoch (P10 - P90) | steps | targets | parameters | ratio | of P10 | a target |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    return '\n'.join(lines + [line for row in rows for line in _lines(row)])


def _lines(row):
    ours = row['ours']
    low, high = ours['epoch_seconds_p10_p90']
    cells = [
        row['recipe'],
        f'{ours["epoch_seconds"]:.2f} ({low:.2f} - {high:.2f})',
        f'{ours["steps_per_epoch"]:,}',
        f'{ours["terms_per_epoch"]:,.0f}',
        f'{ours["parameters"]:,}',
        f'{100 * row["others"]:.0f} %',
    ]
    peers = [_cells(peer) for peer in row['peers']] or [[''] * 8]
    return ['| ' + ' | '.join(cells + peer) + ' |' for peer in peers]


def _cells(peer):
    steps = peer['batches_per_epoch']
    low, high = (peer[f'batch_seconds_{p}'] * steps for p in ('p10', 'p90'))
    return [
        peer['peer'],
        f'{peer["epoch_seconds"]:.1f} ({low:.1f} - {high:.1f})',
        f'{steps:,}',
        f'{peer["loss_terms_per_epoch"]:,}',
        f'{peer["parameters"]:,}',
        *(f'{peer[name]:.1f}' for name in ('ratio', 'ratio_p10', 'ratio_per_target')),
    ]


def main():
    """Measures and prints."""
    arguments = parse_arguments()
    names = recipes(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(arguments, Path(folder))
        write_sequences(base.data, Path(folder) / 'histories.txt')
        rows = []
        for name in names:
            rows.append(measure(name, arguments, base))
            print(*_lines(rows[-1]), sep='\n', flush=True)
        described = sequences.describe(base.data)
    about = {
        'machine': run_lib.machine() | {'processor': processor()},
        'dataset': described,
        'matmul_gflops': matmul_rate() / 1e9,
    }
    print(json.dumps(about, indent=2))
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**about, 'recipes': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
