"""What one accelerator is asked to reach, and what it reached: one run, one short table.

    python -m benchmarks.reach --data_dir=DATA --out=FILE.json

Needs Toys and Sports in DATA. Every figure is of this run, after compilation. On a CPU it runs too,
and says what a CPU does; --quick is a small synthetic world, to see that it runs.
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import large_catalogue, machine, suite, whole_job
from benchmarks import train_throughput as training
from benchmarks.turns import Effort
from fame_jax import records, stages
from fame_jax import run as run_lib
from fame_jax.config import Config
from fame_jax.errors import UserError
from fame_jax.run import Run

Record = dict[str, Any]


class Goal(NamedTuple):
    """One row: what is measured, at most how much of it, in which unit."""

    what: str
    most: float
    unit: str  # s or GB


GOALS = {
    'epoch': Goal('Toys, an epoch of FAME H 2 N 8', 0.5, 's'),
    'evaluation': Goal('Sports, all users by both protocols', 0.2, 's'),
    'step': Goal('a step of 10 million items, D 64: temporaries of the loss', 2, 'GB'),
    # Last, for what it sets stays set: where programs are cached.
    'job': Goal('Toys, whole job, its programs compiled before', 60, 's'),
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--out', type=Path, help='FILE.json')
    parser.add_argument('--only', default='', help=f'goals of {",".join(GOALS)}')
    parser.add_argument('--quick', action='store_true', help='a small synthetic world')
    arguments = parser.parse_args(argv)
    arguments.only = suite.chosen(parser, arguments.only, GOALS)
    return arguments


def open_data(arguments: argparse.Namespace, dataset: str, folder: str) -> Run:
    """A known data set, prepared; in the quick form a synthetic one in its place."""
    name = 'synthetic' if arguments.quick else dataset
    wanted = argparse.Namespace(**{**vars(arguments), 'dataset': name})
    return suite.open_base(wanted, f'{folder}/{dataset}')


def epoch(arguments: argparse.Namespace, folder: str) -> Record:
    """Median seconds of whole epochs, input included; SASRec's beside."""
    base = open_data(arguments, 'toys', folder)
    effort = Effort(rounds=1 if arguments.quick else 5, seconds=0, quick=arguments.quick)
    sasrec, fame = training.time_epochs(base, effort, float('inf'))
    return {'reached': fame['seconds']['median'], 'fame': fame, 'sasrec': sasrec}


def job(arguments: argparse.Namespace, folder: str) -> Record:
    """A run of Toys' recipe to its end, from data to verdict, by the clock.

    A run of an epoch each goes before it and leaves its programs in a compilation cache.
    """
    base = open_data(arguments, 'toys', folder)
    short = {'pretrain_epochs': 1, 'finetune_epochs': 1}
    config = dataclasses.replace(base.config, compilation_cache=f'{folder}/programs')
    first, _ = _run(dataclasses.replace(config, workdir=f'{folder}/first', **short))
    whole = short if arguments.quick else {}
    found, run = _run(dataclasses.replace(config, workdir=f'{folder}/job', **whole))
    results = records.read_json(run.folder / 'results.json')['results']
    test = {stage: results[stage]['test'] for stage in run_lib.TRAINED}
    about = {'stages': found, 'with_compiling': first, 'test': test}
    return {'reached': sum(found.values()), **about}


def _run(config: Config) -> tuple[dict[str, float], Run]:
    """A run from its first stage to its last: seconds of each, and the run."""
    found = {}
    with (
        contextlib.closing(run_lib.open_run(config)) as run,
        contextlib.redirect_stdout(sys.stderr),
    ):
        for stage in ('prepare', 'pretrain', 'finetune', 'evaluate'):
            began = time.perf_counter()
            stages.STAGES[stage](run)
            found[stage] = time.perf_counter() - began
    return found, run


def evaluation(arguments: argparse.Namespace, folder: str) -> Record:
    """Median seconds of ranking every test user with FAME."""
    base = open_data(arguments, 'sports', folder)
    effort = Effort(rounds=1 if arguments.quick else 5, seconds=0, quick=arguments.quick)
    _, fame = whole_job.time_evaluation(base, effort, float('inf'))
    return {'reached': fame['seconds']['median'], 'fame': fame}


def step(arguments: argparse.Namespace, folder: str) -> Record:
    """What a step takes beside state and gradient, and that it runs."""
    # A CPU would take minutes for more tokens, and an accelerator for smaller blocks.
    on_cpu = jax.default_backend() == 'cpu'
    tokens, chunk_tokens, chunk_items = (256, 256, 1024) if on_cpu else (4096, 4096, 16_384)
    items = 20_000 if arguments.quick else 10_000_000
    flags = [f'--items={items}', f'--tokens={tokens}', '--steps=3']
    flags += [f'--chunk_tokens={chunk_tokens}', f'--chunk_items={chunk_items}']
    asked = large_catalogue.parse_arguments(flags)
    found = large_catalogue.measured('streamed', large_catalogue.settings(asked), items, asked)
    gradient = 4 * (items + 1) * asked.width
    return {'reached': (found['temporaries_bytes'] - gradient) / 1e9, 'tokens': tokens, **found}


MEASURES: dict[str, Callable[..., Record]] = {
    'epoch': epoch,
    'evaluation': evaluation,
    'step': step,
    'job': job,
}


def table(found: dict[str, Record]) -> str:
    """Markdown, a goal a row."""
    lines = ['| what | at most | here | reached |', '|---|---|---|---|']
    for name, record in found.items():
        goal = GOALS[name]
        if 'failed' in record:
            here, verdict = record['failed'], 'failed'
        else:
            here = f'{record["reached"]:.3g} {goal.unit}'
            verdict = 'yes' if record['reached'] <= goal.most else 'no'
        lines.append(f'| {goal.what} | {goal.most:g} {goal.unit} | {here} | {verdict} |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; a goal that fails is told in its row and ends nothing."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    result = {'machine': machine.about(), 'quick': arguments.quick, 'goals': {}}
    for name in arguments.only:
        print(f'reach: {name}', file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = MEASURES[name](arguments, folder)
            except UserError as error:
                print(f'error: {error}', file=sys.stderr)
                return 2
            except Exception as error:  # out of memory, not supported: the next goal may do
                found = {'failed': f'{type(error).__name__}: {str(error)[:200]}'}
        result['goals'][name] = found | GOALS[name]._asdict()
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            records.write_json(arguments.out, result)
    about = result['machine']
    print(f'{about["device"]["kind"]}, jax {about["versions"]["jax"]}, {about["date"]}\n')
    print(table(result['goals']))
    return 0


if __name__ == '__main__':
    sys.exit(main())
