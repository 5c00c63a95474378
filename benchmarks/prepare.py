"""Preparing a log: processor seconds and peak memory, against the bare polars operations.

    python -m benchmarks.prepare --rows=1000000,10000000 --ids=int,text --out=FILE.json

A Parquet log is generated. Each way is a process of its own, all in alternating turns:

  polars: reads three columns, k-core to the fixed point, sorts by user and time, numbers the ids,
    writes arrays and ids.
  package: `Dataset.from_file(...).save(...)`, which does the same, and checks, counts and hashes.
  command: `python -m fame_jax.main --stages=prepare`.

Processor seconds and memory are those of the whole process, imports included.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fame_jax import machine, run_dir

Record = dict[str, Any]

K_CORE = 5
BARE = f"""
import sys
import numpy as np
import polars as pl

log, folder = sys.argv[1:]
frame = pl.read_parquet(log, columns=['user_id', 'item_id', 'timestamp'])
while True:
    before = frame.height
    enough = [pl.len().over(name) >= {K_CORE} for name in ('user_id', 'item_id')]
    frame = frame.filter(*enough)
    if frame.height == before:
        break
frame = frame.sort('user_id', 'timestamp', maintain_order=True)
users = frame.group_by('user_id', maintain_order=True).len()
items = frame['item_id'].unique(maintain_order=True)
if items.dtype == pl.String:
    codes = frame['item_id'].cast(pl.Enum(items)).to_physical()
else:
    items = items.sort()
    codes = frame['item_id'].rank('dense') - 1
np.save(folder + '/items.npy', codes.to_numpy().astype(np.int32))
np.save(folder + '/offsets.npy', np.append(0, users['len'].cum_sum().to_numpy()))
users.select('user_id').write_ndjson(folder + '/users.json')
items.to_frame().write_ndjson(folder + '/items.json')
"""
PACKAGE = f"""
import sys
from fame_jax import Dataset

log, folder = sys.argv[1:]
Dataset.from_file(log, k_core={K_CORE}).save(folder + '/dataset')
"""


def write_log(path: Path, rows: int, ids: str, seed: int = 0) -> None:
    """Writes a log with a twentieth as many users as rows and a fiftieth as many items.

    Args:
      path: of the Parquet file.
      rows: actions; few users and items have many of them.
      ids: 'int' or 'text'.
      seed: of the choices.
    """
    rng = np.random.default_rng(seed)

    def draw(number: int) -> np.ndarray:
        return rng.permutation(number)[(number * rng.random(rows) ** 2).astype(np.int64)]

    frame = pl.DataFrame({'user_id': draw(max(rows // 20, 1)), 'item_id': draw(max(rows // 50, 1))})
    seconds = 1_460_000_000 + rng.integers(0, 100_000_000, rows)
    frame = frame.with_columns(timestamp=pl.Series(seconds), price=pl.Series(rng.random(rows)))
    if ids == 'text':
        frame = frame.with_columns(
            pl.format('customer-{}', 'user_id').alias('user_id'),
            pl.format('B{}', 'item_id').alias('item_id'),
        )
    frame.write_parquet(path)


def run(way: str, log: Path, folder: Path) -> Record:
    """Prepares a log in a process; returns its processor seconds and its peak memory in bytes."""
    command = {
        'polars': ['-c', BARE, str(log), str(folder)],
        'package': ['-c', PACKAGE, str(log), str(folder)],
        'command': [
            *('-m', 'fame_jax.main', '--stages=prepare', f'--dataset={log}'),
            *(f'--workdir={folder}', f'--k_core={K_CORE}'),
        ],
    }[way]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f'{way} ended with exit code {process.returncode}')
    return {'seconds': usage.ru_utime + usage.ru_stime, 'bytes': usage.ru_maxrss * 1024}


def measure(rows: int, ids: str, ways: Sequence[str], turns: int, folder: Path) -> list[Record]:
    """Runs the ways in turns; returns the medians of each, and their ratios to the first way."""
    log = folder / f'{rows}-{ids}.parquet'
    # In a process of its own: a process begins with the peak memory of the one that started it.
    make = [f'--write={log}', f'--rows={rows}', f'--ids={ids}']
    subprocess.run([sys.executable, '-m', 'benchmarks.prepare', *make], check=True)
    runs: dict[str, list[Record]] = {way: [] for way in ways}
    for _ in range(turns):
        for way in ways:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                runs[way].append(run(way, log, Path(made)))
    log.unlink()
    records = []
    for way in ways:
        record: Record = {'way': way, 'rows': rows, 'ids': ids, 'turns': turns}
        for unit in ('seconds', 'bytes'):
            values = [one[unit] for one in runs[way]]
            record[unit] = statistics.median(values)
            record[f'all_{unit}'] = values
            record[f'{unit}_ratio'] = record[unit] / (records or [record])[0][unit]
        records.append(record)
    return records


def line(record: Record) -> str:
    """A record in one line."""
    return (
        f'{record["rows"]:>12,} rows, {record["ids"]:4} ids, {record["way"]:8} '
        f'{record["seconds"]:8.2f} s ({record["seconds_ratio"]:5.2f} x) '
        f'{record["bytes"] / 1e6:8,.0f} MB ({record["bytes_ratio"]:4.2f} x)'
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', default='1000000', help='sizes of logs, with commas')
    parser.add_argument('--ids', default='int,text', help='kinds of ids')
    parser.add_argument('--ways', default='polars,package,command', help='the first is the base')
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--folder', type=Path, help='for the logs; a temporary one by default')
    parser.add_argument('--write', type=Path, help='write a log of this name, and run nothing')
    parser.add_argument('--out', type=Path, help='write the figures to this .json')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(argv)
    if args.write:
        return write_log(args.write, int(args.rows), args.ids)
    result: Record = {'machine': machine.describe(), 'records': []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for rows in map(int, args.rows.split(',')):
            for ids in args.ids.split(','):
                records = measure(rows, ids, args.ways.split(','), args.turns, Path(folder))
                result['records'] += records
                print('\n'.join(map(line, records)), flush=True)
    if args.out:
        run_dir.write_json(args.out, result)


if __name__ == '__main__':
    main(sys.argv[1:])
