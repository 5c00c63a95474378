"""Updates with new days against training from scratch on the same data, on MovieLens-100K by time.

    python -m benchmarks.update --data_dir=DATA --out=FILE.json --seeds=0,1,2

A run is trained on the first 80 % of the ratings by time. Four updates follow, one from the other,
of 5 % each. After each, another run is trained from scratch on the same data. Commands are timed as
a whole, in turns: start of Python, reading, compilation without a cache, training; by processor
time (user and system, all threads), since other work may share the machine, and by the clock.
Both are then ranked under one protocol: leave one out on the merged data, all users.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fame_jax as fj
from benchmarks.timing import describe_machine
from fame_jax.evaluation.metrics import metrics

CUTS = (0.8, 0.85, 0.9, 0.95, 1.0)
MODEL = ('--model=sasrec', '--max_length=50', '--row_length=64', '--rows_per_step=8')


def write_parts(path: Path, folder: Path) -> list[Path]:
    """Writes the ratings of ml-100k.inter by time as CSV files: the first part, then new ones."""
    lines = path.read_text().splitlines()[1:]
    rows = sorted((line.split('\t') for line in lines), key=lambda row: float(row[3]))
    ends, paths = [0, *(round(cut * len(rows)) for cut in CUTS)], []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        paths.append(folder / f'part{number}.csv')
        text = '\n'.join(','.join(row) for row in rows[start:end])
        paths[-1].write_text(f'user,item,rating,timestamp\n{text}\n')
    return paths


def run(*flags: str) -> dict[str, float]:
    """Runs a command of the command line; its processor seconds and seconds."""
    cache = ('JAX_COMPILATION_CACHE_DIR', 'JAX_ENABLE_COMPILATION_CACHE')
    environment = {name: value for name, value in os.environ.items() if name not in cache}
    environment['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
    argv = [sys.executable, '-m', 'fame_jax.main', '--progress=none', *flags]
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(argv, env=environment, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f'{" ".join(argv)}\n{errors.read().decode()}')
    seconds = time.monotonic() - began
    return {'cpu_seconds': usage.ru_utime + usage.ru_stime, 'seconds': seconds}


def rank(folder: Path, data: fj.Dataset) -> dict[str, float]:
    """NDCG@10 and HR@10 of a run on both splits, masked."""
    recommender, found = fj.load(folder), {}
    for split in ('validation', 'test'):
        values = metrics(fj.evaluate(recommender, data, split).masked)
        found |= {f'{split}_{name}': values[name] for name in ('ndcg@10', 'hr@10')}
    with (folder / 'metrics.jsonl').open() as lines:
        found['epochs'] = max(json.loads(line)['epoch'] for line in lines)
    return found


def measure(parts: Sequence[Path], folder: Path, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """The first run, its updates, and runs from scratch on the data of each update."""
    own = [*MODEL, *flags, f'--seed={seed}']
    before = folder / 'first'
    first = run(*own, f'--dataset={parts[0]}', f'--workdir={before}', '--stages=prepare,pretrain')
    record = {'seed': seed, 'first': first, 'updates': []}
    for number, part in enumerate(parts[1:], 1):
        updated, scratch = folder / f'update{number}', folder / f'scratch{number}'
        step = {
            'update': run(
                f'--append={part}', f'--from={before}', f'--workdir={updated}', '--stages=update'
            ),
            'scratch': run(
                *own, f'--prepared={updated}', f'--workdir={scratch}', '--stages=prepare,pretrain'
            ),
        }
        data = fj.Dataset.load(updated / 'dataset')
        for name, path in (('update', updated), ('scratch', scratch)):
            step[name] |= rank(path, data)
        (appended,) = data.card['appended'][-1:]
        names = ('actions', 'new_users', 'new_items')
        step['data'] = {name: appended[name] for name in names} | {
            'users': data.num_users,
            'items': data.num_items,
        }
        record['updates'].append(step)
        print(f'seed {seed}, update {number}: {json.dumps(step)}', flush=True)
        before = updated
    return record


def summarise(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and deviations over the seeds, of each update."""
    rows = []
    for number in range(len(CUTS) - 1):
        steps = [seed['updates'][number] for seed in seeds]
        row: dict[str, Any] = {'update': number + 1, **steps[0]['data']}
        for name in ('update', 'scratch'):
            for key in ('validation_ndcg@10', 'test_ndcg@10', 'cpu_seconds', 'seconds', 'epochs'):
                values = [step[name][key] for step in steps]
                row[f'{name}_{key}'] = statistics.fmean(values)
                if len(values) > 1 and 'ndcg' in key:
                    row[f'{name}_{key}_deviation'] = statistics.stdev(values)
        row['cpu_ratio'] = row['scratch_cpu_seconds'] / row['update_cpu_seconds']
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the JSON file, after each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data_dir', required=True, help='the folder with ml-100k/ml-100k.inter')
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--flags', default='', help="flags of all runs, such as '--width=32'")
    options = parser.parse_args(argv)
    record: dict[str, Any] = {
        'command': f'python -m benchmarks.update --data_dir=DATA --seeds={options.seeds}'
        + (f" --flags='{options.flags}'" if options.flags else ''),
        'machine': describe_machine(),
        'protocol': 'leave one out on the merged data, all users, masked; ratings by time',
        'seeds': [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = write_parts(Path(options.data_dir) / 'ml-100k' / 'ml-100k.inter', folder)
        for seed in map(int, options.seeds.split(',')):
            found = measure(parts, folder / f'seed{seed}', seed, options.flags.split())
            record['seeds'].append(found)
            record['updates'] = summarise(record['seeds'])
            options.out.write_text(json.dumps(record, indent=2) + '\n')
    for row in record['updates']:
        print(json.dumps(row))
    return 0


if __name__ == '__main__':
    sys.exit(main())
