"""The FAME paper's Table 2 under one protocol: every model on every data set, several seeds.

    python -m benchmarks.table2 --datasets=toys --models=all --seeds=0,1,2 --data_dir=DATA

A run is a process of its own, `python -m fame_jax.main`, in FOLDER/DATASET/MODEL_seedN, with its
screen in a .log beside it. What is there is not run again, what is half done goes on, and what
fails holds up nothing but what needs it. Ctrl-C is passed on: the runs save, and the same command
goes on from there. SASRec is the backbone of FAME and runs before it.

FOLDER then holds table2.md, table2.json (all that is told, and per seed), table2.svg and .png.
Every model's epoch, and the model FAME is tested against, are chosen on validation, never on test.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import series, table_page, table_picture, verdict
from benchmarks.children import Process, say
from benchmarks.runs import MODELS, Run
from fame_jax import records
from fame_jax.errors import UserError

NAME = 'benchmarks.table2'


def main(argv: Sequence[str], start: Callable[[Run, int], Process] | None = None) -> int:
    """Runs what is missing, writes the table and returns the exit code, as `series.main` has it."""
    return series.main(argv, parse, plan, tell, start)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; those that --quick sets can be given beside it.

    Raises:
      UserError: on an unknown flag or a value that cannot be.
    """
    quick = '--quick' in argv
    preset = {'seeds': (0,) if quick else (0, 1, 2)}
    preset['folder'] = 'runs/table2_quick' if quick else 'runs/table2'
    parser, add = series.parser(NAME, __doc__, preset)
    add('--datasets', type=series.names, default=('synthetic',) if quick else ('toys',))
    add('--models', type=series.names, default=('all',), help=f'all, or of {", ".join(MODELS)}')
    options = series.read(parser, argv)
    options.models = tuple(MODELS) if options.models == ('all',) else options.models
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        raise UserError(f'--models={unknown[0]}: choose all, or from {", ".join(MODELS)}')
    return options


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs in their order: all models of a seed before the next seed, backbones before FAME.

    Raises:
      UserError: when two data sets would lie in one folder.
    """
    models = {}
    for name in options.models:
        models |= {MODELS[name].backbone or name: None, name: None}
    folders = {dataset: series.folder_of(options, dataset) for dataset in options.datasets}
    twice = [path for path, count in collections.Counter(folders.values()).items() if count > 1]
    if twice:
        raise UserError(
            f'--datasets holds two that are called {twice[0].name}; give each its --folder'
        )
    return [
        _run(options, dataset, folder, model, seed)
        for dataset, folder in folders.items()
        for seed in options.seeds
        for model in models
    ]


def _run(options: argparse.Namespace, dataset: str, folder: Path, model: str, seed: int) -> Run:
    backbone = MODELS[model].backbone
    workdir = folder / f'{model}_seed{seed}'
    needs = folder / f'{backbone}_seed{seed}' if backbone else None
    flags = series.flags(options, dataset, model, seed, workdir, needs)
    return Run(dataset, model, seed, workdir, flags, needs)


def command(options: argparse.Namespace) -> str:
    """The command that makes the table, without what changes no figure."""
    models = 'all' if options.models == tuple(MODELS) else ','.join(options.models)
    datasets = ','.join(options.datasets)
    return series.command(NAME, options, f'--datasets={datasets}', f'--models={models}')


def tell(options: argparse.Namespace, runs: Sequence[Run]) -> bool:
    """Writes the table, if any run is done."""
    datasets = verdict.collect(runs)
    if datasets:
        write({'command': command(options), 'datasets': datasets}, Path(options.folder))
    return bool(datasets)


def write(table: dict[str, Any], folder: Path) -> None:
    """Writes table2.json, .md, .svg and .png."""
    records.write_json(folder / 'table2.json', table)
    records.write_text(folder / 'table2.md', table_page.markdown(table))
    for suffix in ('svg', 'png'):
        table_picture.draw(table, folder / f'table2.{suffix}')
    say(f'the table is in {folder / "table2.md"}, with .json, .svg and .png beside it')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
