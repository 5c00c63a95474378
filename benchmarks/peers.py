"""A training epoch of our models compared with the same model in PyTorch, in alternating turns.

    python -m benchmarks.peers --dataset=toys --data_dir=DATA --peers=PYTHON --out=FILE.json

PYTHON is the interpreter of the peers' environment (benchmarks/peers/README.md). SASRec, GRU4Rec,
BERT4Rec and CORE are compared with RecBole's; FAME with a plain PyTorch form of its equations, in
its two variants. With --peer_device=cuda FAME and SASRec are compared with plain PyTorch on the
GPU, as it is and by torch.compile; RecBole is then not needed. A peer trains on the same histories,
in a process of its own. Our models are timed by whole epochs after compilation, the layout of rows
included; a peer by --peer_batches batches, from whose median its epoch is extrapolated. Targets are
the terms of an epoch's losses. The number of optimizer steps differs, and BERT4Rec draws other
masks, so the last column is per target. Without --peers only ours are timed.

Other load on the machine slows PyTorch far more than XLA, so a ratio from a busy machine means
nothing.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.speed import Bench, Training
from benchmarks.timing import Record
from fame_jax import machine, run_dir
from fame_jax.data.dataset import Dataset

PROGRAMS = Path(__file__).parent / 'peers'
RECBOLE = {'sasrec': 'SASRec', 'gru4rec': 'GRU4Rec', 'bert4rec': 'BERT4Rec', 'core': 'CORE'}
FAMES = ('fame', 'fame_bert4rec')  # trained by the stage finetune
# Fields of our module that are flags of fame_torch.py.
FAME_FIELDS = ('width', 'num_blocks', 'num_heads', 'num_experts', 'dropout', 'temperature')


def write_histories(data: Dataset, path: Path) -> None:
    """The histories as the peers read them, one user a line: `user item item ...`."""
    with path.open('w') as file:
        for user, (start, end) in enumerate(zip(data.offsets[:-1], data.offsets[1:]), 1):
            print(user, *data.items[start:end], file=file)


def command(program: str, args: argparse.Namespace, folder: Path, *more: Any) -> list[str]:
    """The command line of a peer."""
    words = [args.peers, PROGRAMS / program, '--data_dir', folder, '--dataset', 'histories']
    words += ['--batch', args.peer_batch, '--max_len', 50, '--threads', machine.cores(), *more]
    return [str(word) for word in words]


def time_recbole(name: str, args: argparse.Namespace, folder: Path) -> Record:
    """The figures of one of RecBole's models, from a process that ends."""
    out = folder / f'{name}.json'
    more = ['--model', name, '--batches', args.peer_batches, '--json', out]
    more += ['--anomaly_detection'] * args.anomaly_detection
    subprocess.run(command('recbole_models.py', args, folder, *more), check=True)
    return {'peer': 'RecBole', **run_dir.read_json(out)}


@contextlib.contextmanager
def torch_fame(
    module: Any, args: argparse.Namespace, folder: Path, compiled: bool = False
) -> Iterator[Any]:
    """fame_torch.py as a function batches -> the figures so far; it waits between its turns."""
    more = [f'--{name}={getattr(module, name, 1)}' for name in FAME_FIELDS]
    more += [f'--device={args.peer_device}', *(['--compile'] if compiled else [])]
    more += [] if hasattr(module, 'num_experts') else ['--forms=sasrec']
    process = subprocess.Popen(
        command('fame_torch.py', args, folder, *more, '--turns'),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def read() -> Record:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f'fame_torch.py ended with code {process.wait()}')
        return json.loads(line)

    about = read()  # it is warmed up from here on

    def turn(batches: int) -> list[Record]:
        print(batches, file=process.stdin, flush=True)
        forms = read()
        name = 'PyTorch, compiled' if compiled else 'PyTorch'
        return [{'peer': f'{name}, {form}', **about, **timed} for form, timed in forms.items()]

    try:
        yield turn
    finally:
        process.stdin.close()
        process.wait()


def take_turns(
    name: str, training: Training, args: argparse.Namespace, folder: Path
) -> tuple[list[float], list[Record]]:
    """Ours, the peer, ours again and so on: seconds of each epoch of ours, and the peer's forms."""
    times, peers = [timing.time_calls(training.epoch, 1)], []
    on_gpu = args.peers and args.peer_device == 'cuda'
    if on_gpu and name in ('fame', 'sasrec'):
        for compiled in (False, True):
            with torch_fame(training.module, args, folder, compiled) as turn:
                peers += turn(args.peer_batches)
            times.append(timing.time_calls(training.epoch, 1))
    elif args.peers and name in RECBOLE:
        peers = [time_recbole(RECBOLE[name], args, folder)]
    elif args.peers and name == 'fame':
        with torch_fame(training.module, args, folder) as turn:
            for _ in range(args.turns):
                peers = turn(-(-args.peer_batches // args.turns))
                times.append(timing.time_calls(training.epoch, 1))
    return [*times, timing.time_calls(training.epoch, 1)], peers


def measure(name: str, args: argparse.Namespace, bench: Bench) -> Record:
    """The figures of one model and of its peers."""
    stage = 'finetune' if name in FAMES else 'pretrain'
    training = Training(bench.open(f'--model={name}'), stage)
    sums = training.epoch()  # compiles
    times, peers = take_turns(name, training, args, bench.folder)
    ours = timing.spread(times) | {
        'targets': sum(float(block['weight'].sum()) for block in sums),
        'steps': training.make_epoch(0).num_steps,
        'parameters': training.num_parameters,
    }
    return {'model': name, 'ours': ours, 'peers': [peer | ratios(ours, peer) for peer in peers]}


def ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """A peer's epoch in ours, by medians, and its time for a target in ours."""
    ratio = peer['epoch_seconds'] / ours['seconds']['median']
    targets = peer['loss_terms_per_epoch'] / ours['targets']
    return {'ratio': ratio, 'ratio_per_target': ratio / targets}


HEAD = (
    '| model | s an epoch (min - max) | steps | targets | parameters | peer | s an epoch '
    '(P10 - P90) | steps | targets | parameters | ratio | a target |\n' + '|---' * 12 + '|'
)


def lines(row: Mapping[str, Any]) -> list[str]:
    """A row of the table for each peer."""
    ours = row['ours']
    median, low, high = (ours['seconds'][name] for name in ('median', 'min', 'max'))
    cells = [row['model'], f'{median:.2f} ({low:.2f} - {high:.2f})', f'{ours["steps"]:,}']
    cells += [f'{ours["targets"]:,.0f}', f'{ours["parameters"]:,}']
    cells_of_peers = []
    for peer in row['peers']:
        steps = peer['batches_per_epoch']
        low, high = (peer[f'batch_seconds_{p}'] * steps for p in ('p10', 'p90'))
        cells_of_peers.append(
            [
                *(peer['peer'], f'{peer["epoch_seconds"]:.1f} ({low:.1f} - {high:.1f})'),
                *(f'{steps:,}', f'{peer["loss_terms_per_epoch"]:,}', f'{peer["parameters"]:,}'),
                *(f'{peer["ratio"]:.1f}', f'{peer["ratio_per_target"]:.1f}'),
            ]
        )
    return ['| ' + ' | '.join([*cells, *peer]) + ' |' for peer in cells_of_peers or [[''] * 7]]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='toys')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--models', default='sasrec,gru4rec,bert4rec,core,fame')
    parser.add_argument('--peers', default='', help="the peers' python; empty: only our models")
    parser.add_argument('--peer_batches', type=int, default=40, help='timed, of each peer')
    parser.add_argument('--peer_device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--peer_batch', type=int, default=256, help='prefixes in a step of a peer')
    parser.add_argument(
        '--anomaly_detection', action='store_true', help='RecBole as installed, which turns it on'
    )
    parser.add_argument('--turns', type=int, default=4, help='of fame_torch.py and of our FAME')
    parser.add_argument('--out', type=Path, help='write the figures to this .json')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(argv)
    result: Record = {'machine': timing.describe_machine(), 'models': []}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args.dataset, args.data_dir, Path(name), quick=False)
        result['dataset'] = bench.base.data.describe()
        write_histories(bench.base.data, bench.folder / 'histories.txt')
        print(timing.headline(result['machine']), result['dataset'], '', HEAD, sep='\n')
        for model in args.models.split(','):
            result['models'].append(measure(model, args, bench))
            print(*lines(result['models'][-1]), sep='\n', flush=True)
            if args.out:
                run_dir.write_json(args.out, result)


if __name__ == '__main__':
    main(sys.argv[1:])
