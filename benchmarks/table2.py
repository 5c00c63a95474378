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
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import table_page, table_picture, verdict
from benchmarks.children import Process, run_all, say, start_child
from benchmarks.runs import MODELS, Run, check
from fame_jax import records
from fame_jax.errors import UserError, explain_os_errors

QUICK = {'datasets': ('synthetic',), 'seeds': (0,), 'folder': 'runs/table2_quick'}
QUICK_FLAGS = (
    *('--synthetic_users=400', '--synthetic_items=100'),
    *('--pretrain_epochs=3', '--finetune_epochs=3'),
)
# What tells one run from another, and what the table sets by itself.
OWN = ('model', 'dataset', 'seed', 'workdir', 'stages', 'backbone_from', 'flagfile')


def main(argv: Sequence[str], start: Callable[[Run, int], Process] | None = None) -> int:
    """Runs what is missing, writes the table and returns the exit code.

    Args:
      argv: arguments without the program's name.
      start: (run, how many run at once) -> its process; other than `start_child` in tests.

    Returns:
      0; 1 when a run failed; 2 for a user's mistake; 128 + n when signal n stopped it.
    """
    try:
        options = parse(argv)
        runs = plan(options)
        failed, folder = {}, Path(options.folder)
        for run in runs:
            if run.done() or not options.only_table:
                check(run, Path(options.recipes) / f'{run.model}.cfg')
        if not options.only_table:
            with explain_os_errors(f'making the folder {folder}', 'choose another --folder'):
                folder.mkdir(parents=True, exist_ok=True)
            failed, stopped = run_all(runs, options.jobs, start or start_child)
            for name, why in failed.items():
                say(f'{name}: {why}')
            if stopped:
                say(f'stopped by {stopped.name}; the same command goes on from there')
                return 128 + stopped
        if datasets := verdict.collect(runs):
            write({'command': command(options), 'datasets': datasets}, folder)
        elif options.only_table:
            raise UserError(
                f'{options.folder} holds no finished run of those; leave --only_table out'
            )
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; --help lists the flags')


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; those that --quick sets can be given beside it.

    Raises:
      UserError: on an unknown flag or a value that cannot be.
    """
    quick = '--quick' in argv
    options = _flags(QUICK if quick else {}).parse_args(argv)
    options.extra = [flag for text in options.extra for flag in _split(text)]
    options.extra = [*(QUICK_FLAGS if quick else ()), *options.extra]
    options.models = tuple(MODELS) if options.models == ('all',) else options.models
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        raise UserError(f'--models={unknown[0]}: choose all, or from {", ".join(MODELS)}')
    if options.jobs < 1:
        raise UserError(f'--jobs={options.jobs} is out of range; it must be at least 1')
    return options


def _split(text: str) -> list[str]:
    """The flags of an --extra; none of them may be what tells one run from another."""
    try:
        extra = shlex.split(text)
    except ValueError as error:
        raise UserError(f'--extra={text}: {error}; quote it as a shell wants it') from error
    for flag in extra:
        name = flag.lstrip('-').split('=')[0]
        if name in OWN:
            raise UserError(f'--extra={flag}: {name} is what tells the runs apart; leave it out')
    return extra


def _flags(preset: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(prog='python -m benchmarks.table2', description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('--datasets', type=_names, default=preset.get('datasets', ('toys',)))
    add('--models', type=_names, default=('all',), help=f'all, or of {", ".join(MODELS)}')
    add('--seeds', type=_seeds, default=preset.get('seeds', (0, 1, 2)))
    add('--data_dir', default='', help='as of fame_jax.main')
    add('--folder', default=preset.get('folder', 'runs/table2'))
    add('--recipes', default='experiments/models', help='folder of a flag file MODEL.cfg each')
    add('--jobs', type=int, default=1, help='runs at a time; they slow each other down')
    add('--extra', action='append', default=[], help="flags for every run: --extra='--a=1 --b=2'")
    add('--quick', action='store_true', help='one seed, synthetic data, few epochs: minutes')
    add('--only_table', action='store_true', help='from what is there')
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError('it names nothing')
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(name) for name in _names(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text} should be numbers with commas between, as in 0,1,2'
        ) from error


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs in their order: all models of a seed before the next seed, backbones before FAME.

    Raises:
      UserError: when two data sets would lie in one folder.
    """
    models = {}
    for name in options.models:
        models |= {MODELS[name].backbone or name: None, name: None}
    folders = {dataset: Path(dataset).name.split('.')[0] for dataset in options.datasets}
    twice = [name for name, count in collections.Counter(folders.values()).items() if count > 1]
    if twice:
        raise UserError(f'--datasets holds two that are called {twice[0]}; give each its --folder')
    return [
        _run(options, dataset, Path(options.folder) / folder, model, seed)
        for dataset, folder in folders.items()
        for seed in options.seeds
        for model in models
    ]


def _run(options: argparse.Namespace, dataset: str, folder: Path, model: str, seed: int) -> Run:
    backbone = MODELS[model].backbone
    workdir, needs = folder / f'{model}_seed{seed}', folder / f'{backbone}_seed{seed}'
    flags = [
        f'--flagfile={Path(options.recipes) / f"{model}.cfg"}',
        f'--dataset={dataset}',
        f'--seed={seed}',
        f'--workdir={workdir}',
        f'--stages=prepare,{MODELS[model].stage},evaluate',
        *([f'--data_dir={options.data_dir}'] if options.data_dir else []),
        *([f'--backbone_from={needs}'] if backbone else []),
        *options.extra,
    ]
    return Run(dataset, model, seed, workdir, tuple(flags), needs if backbone else None)


def command(options: argparse.Namespace) -> str:
    """The command that makes the table, without what changes no figure."""
    models = 'all' if options.models == tuple(MODELS) else ','.join(options.models)
    parts = [f'--datasets={",".join(options.datasets)}', f'--models={models}']
    parts += [f'--seeds={",".join(map(str, options.seeds))}']
    extra = options.extra[len(QUICK_FLAGS) :] if options.quick else options.extra
    parts += ['--quick'] if options.quick else []
    parts += [f'--extra={shlex.join(extra)}'] if extra else []
    return 'python -m benchmarks.table2 ' + shlex.join(parts)


def write(table: dict[str, Any], folder: Path) -> None:
    """Writes table2.json, .md, .svg and .png."""
    records.write_json(folder / 'table2.json', table)
    records.write_text(folder / 'table2.md', table_page.markdown(table))
    for suffix in ('svg', 'png'):
        table_picture.draw(table, folder / f'table2.{suffix}')
    say(f'the table is in {folder / "table2.md"}, with .json, .svg and .png beside it')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
