"""The packed files of benchmarks.campaign, and the tables that are made from them."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.campaign_jobs import Record
from fame_jax import run_dir
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.report import tables
from fame_jax.report.collect import DAMAGED, TRAINED
from fame_jax.report.markdown import SELECT_ON, markdown

MOST_BYTES, MOST_FILES = 15 * 2**20, 5  # of a file; of files of ranks


def pack(
    out: Path, records: Mapping[str, Record], most_bytes: int = MOST_BYTES, most: int = MOST_FILES
) -> None:
    """Writes results.json and ranks_K.npz from the folders of the runs.

    Args:
      out: the campaign's folder.
      records: of the jobs by name.
      most_bytes: of a file; runs and ranks beyond are left out, and said.
      most: of files of ranks.
    """
    runs, files, left_out = {}, [], []
    texts, size = len(json.dumps(records)) + 100, most_bytes
    for path in sorted((out / 'runs').glob('*/*/seed_*/results.json')):
        key = str(path.parent.relative_to(out / 'runs'))
        try:
            run, ranks = run_dir.read_json(path), dict(_test_ranks(path.with_name('ranks.npz')))
        except (UserError, *DAMAGED) as error:
            left_out.append(f'{key}, which is damaged ({error})')
            continue
        length = len(json.dumps(run)) + len(key) + 8
        if texts + length > most_bytes:
            left_out.append(f'{key}, since results.json is full')
            continue
        texts += length
        runs[key] = run
        for entry, rank_U in ranks.items():
            added = rank_U.nbytes + 512  # deflate may not make it smaller
            if size + added > most_bytes and len(files) < most:
                files.append({})
                size = 0
            if size + added <= most_bytes:
                files[-1][f'{key}/{entry}'] = rank_U
                size += added
            else:
                left_out.append(f'ranks of {key}/{entry}, since {most} files are full')
    text = json.dumps({'jobs': records, 'runs': runs}, separators=(',', ':'))
    run_dir.write_text(out / 'results.json', text)
    for old in out.glob('ranks_*.npz'):
        old.unlink()
    for number, arrays in enumerate(files):
        with run_dir.atomic_write(out / f'ranks_{number}.npz') as file:
            np.savez_compressed(file, **arrays)
    if left_out:
        print(f'left out: {left_out[0]}; {len(left_out)} in all', flush=True)


def _test_ranks(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """STAGE/test/PROTOCOL and the ranks of each trained stage, in the smallest type."""
    with np.load(path) as stored:
        for entry in stored.files:
            stage, split, _ = entry.split('/')
            if stage in TRAINED and split == 'test':
                rank_U = stored[entry]
                yield entry, rank_U.astype(np.min_scalar_type(int(rank_U.max())))


def read(folder: Path) -> dict[str, Any]:
    """The jobs and runs of a campaign's results.json.

    Raises:
      UserError: when it is missing or another program's.
    """
    stored = run_dir.read_json(folder / 'results.json')
    if not (isinstance(stored, dict) and {'jobs', 'runs'} <= {*stored}):
        raise UserError(f'{folder / "results.json"} was not written by benchmarks.campaign')
    return stored


def make_tables(folders: Sequence[Path]) -> dict[str, Any]:
    """The tables of `fame_jax.report.tables` from the packed files of campaigns.

    Args:
      folders: each with results.json and ranks_K.npz.

    Returns:
      As `tables.collect`; with `campaigns`, the records of the jobs by folder.

    Raises:
      UserError: when a file is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as name:
        paths, campaigns = [], {}
        for number, folder in enumerate(folders):
            campaigns[str(folder)], found = _unpack(folder, Path(name) / str(number))
            paths += found
        results, baselines = tables.read_runs(paths)
        made = tables.collect(results, baselines)
        for dataset, table in made['datasets'].items():
            of_data = [result for result in results if result.dataset['name'] == dataset]
            _add_tests(table, of_data, baselines)
    return made | {'campaigns': campaigns}


def _unpack(folder: Path, to: Path) -> tuple[dict[str, Record], list[Path]]:
    """Makes a folder of each run, as the stage evaluate leaves it; the jobs, and the folders."""
    stored, ranks, paths = read(folder), {}, []
    for path in sorted(folder.glob('ranks_*.npz')):
        try:
            with np.load(path) as file:
                for entry in file.files:
                    key, *rest = entry.rsplit('/', 3)
                    ranks.setdefault(key, {})['/'.join(rest)] = file[entry]
        except DAMAGED as error:
            raise UserError(f'{path} is damaged ({error}); copy it again') from error
    for key, run in stored['runs'].items():
        place = to / f'{folder.name}_{key.replace("/", "_")}'
        place.mkdir(parents=True)
        run_dir.write_json(place / 'results.json', run)
        if key in ranks:
            np.savez(place / 'ranks.npz', **ranks[key])
        paths.append(place)
    return stored['jobs'], paths


def _add_tests(
    table: dict[str, Any], results: Sequence[tables.Result], baselines: Mapping[str, Any]
) -> None:
    """Tests the best FAME against its backbone and the best other row, best by validation."""
    selected = table['select_on']
    rows = {row['title']: row for row in table['rows'] if row['seeds']}
    scores = {t: row['validation'][selected][SELECT_ON]['mean'] for t, row in rows.items()}
    fames = [title for title, row in rows.items() if row['model'] in ('fame', 'fame_plus')]
    if not fames:
        return
    fame = max(fames, key=scores.__getitem__)
    of_fame = {result.folder for result in results if result.title == fame}
    chosen = {r.title for r in results if r.folder in of_fame}  # with its backbone
    others = [t for t in rows if t not in chosen and not rows[t]['model'].startswith('fame')]
    if others:
        chosen.add(max(others, key=scores.__getitem__))
    of_chosen = [result for result in results if result.title in chosen]
    (tested,) = tables.collect(of_chosen, baselines, fame, False)['datasets'].values()
    table['tests'] = tested['tests']
    table['notes'] += [note for note in tested['notes'] if note not in table['notes']]


def report(folders: Sequence[Path], out: Path | None) -> None:
    """Prints the tables and the jobs that are not done; writes tables.md and tables.json."""
    made = make_tables(folders)
    page = [markdown(made)] if made['datasets'] else []
    for folder, jobs in made['campaigns'].items():
        for name, record in jobs.items():
            if record['state'] != 'done':
                line = f': {record["line"]}' if 'line' in record else ''
                page.append(f'Not done: {folder}, {name}, {record["state"]}{line}\n')
    print('\n'.join(page), end='')
    if out:
        with explain_os_errors(f'making the folder {out}', 'choose another --out'):
            out.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(out / 'tables.json', made)
        run_dir.write_text(out / 'tables.md', '\n'.join(page))
