"""What programs of many runs have in common: their flags, a run's own, and how they end."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.children import Process, run_all, say, start_child
from benchmarks.runs import MODELS, Run, check
from fame_jax.errors import UserError, explain_os_errors

QUICK_FLAGS = (
    *('--synthetic_users=400', '--synthetic_items=100'),
    *('--pretrain_epochs=3', '--finetune_epochs=3'),
)
# What tells one run from another, and what a program of many runs sets by itself.
OWN = ('model', 'dataset', 'seed', 'workdir', 'stages', 'backbone_from', 'flagfile')


def main(
    argv: Sequence[str],
    parse: Callable[[Sequence[str]], argparse.Namespace],
    plan: Callable[[argparse.Namespace], Sequence[Run]],
    tell: Callable[[argparse.Namespace, Sequence[Run]], bool],
    start: Callable[[Run, int], Process] | None = None,
) -> int:
    """Runs what is missing, tells of what is there and returns the exit code.

    Args:
      argv: arguments without the program's name.
      parse: argv -> flags, those of `parser` among them.
      plan: flags -> the runs, backbones before what needs them.
      tell: (flags, runs) -> whether any run was done, so that files were written.
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
        if not tell(options, runs) and options.only_table:
            raise UserError(
                f'{options.folder} holds no finished run of those; leave --only_table out'
            )
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 1 if failed else 0


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; --help lists the flags')


def parser(name: str, about: str, preset: Mapping[str, Any]) -> tuple[Parser, Callable[..., Any]]:
    """A parser with the flags that all have, and its add_argument for more.

    Args:
      name: of the module.
      about: its docstring.
      preset: defaults of seeds and folder.
    """
    made = Parser(prog=f'python -m {name}', description=about, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add('--seeds', type=numbers, default=preset['seeds'])
    add('--data_dir', default='', help='as of fame_jax.main')
    add('--folder', default=preset['folder'])
    add('--recipes', default='experiments/models', help='folder of a flag file MODEL.cfg each')
    add('--jobs', type=int, default=1, help='runs at a time; they slow each other down')
    add('--extra', action='append', default=[], help="flags for every run: --extra='--a=1 --b=2'")
    add('--quick', action='store_true', help='synthetic data, few epochs: minutes')
    add('--only_table', action='store_true', help='from what is there')
    return made, add


def read(made: Parser, argv: Sequence[str], own: Sequence[str] = OWN) -> argparse.Namespace:
    """The flags of argv, --extra as a list of flags, none of them one of `own`.

    Raises:
      UserError: on an unknown flag or a value that cannot be.
    """
    options = made.parse_args(argv)
    options.extra = [flag for text in options.extra for flag in _split(text, own)]
    options.extra = [*(QUICK_FLAGS if options.quick else ()), *options.extra]
    if options.jobs < 1:
        raise UserError(f'--jobs={options.jobs} is out of range; it must be at least 1')
    return options


def _split(text: str, own: Sequence[str]) -> list[str]:
    """The flags of an --extra; none of them may be what tells one run from another."""
    try:
        extra = shlex.split(text)
    except ValueError as error:
        raise UserError(f'--extra={text}: {error}; quote it as a shell wants it') from error
    for flag in extra:
        name = flag.lstrip('-').split('=')[0]
        if name in own:
            raise UserError(f'--extra={flag}: {name} is what tells the runs apart; leave it out')
    return extra


def names(text: str) -> tuple[str, ...]:
    """Names with commas between, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError('it names nothing')
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between, each once."""
    try:
        return tuple(dict.fromkeys(int(name) for name in names(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text} should be numbers with commas between, as in 0,1,2'
        ) from error


def folder_of(options: argparse.Namespace, dataset: str) -> Path:
    """Where the runs of a data set lie."""
    return Path(options.folder) / Path(dataset).name.split('.')[0]


def flags(
    options: argparse.Namespace,
    dataset: str,
    model: str,
    seed: int,
    workdir: Path,
    needs: Path | None,
) -> tuple[str, ...]:
    """The flags of one run; those of --extra come last and win."""
    return (
        f'--flagfile={Path(options.recipes) / f"{model}.cfg"}',
        f'--dataset={dataset}',
        f'--seed={seed}',
        f'--workdir={workdir}',
        f'--stages=prepare,{MODELS[model].stage},evaluate',
        *([f'--data_dir={options.data_dir}'] if options.data_dir else []),
        *([f'--backbone_from={needs}'] if needs else []),
        *options.extra,
    )


def command(name: str, options: argparse.Namespace, *more: str) -> str:
    """The command that makes the same figures, without what changes none.

    Args:
      name: of the module.
      options: its flags.
      more: flags of its own, spelt out.
    """
    extra = options.extra[len(QUICK_FLAGS) :] if options.quick else options.extra
    parts = [*more, f'--seeds={",".join(map(str, options.seeds))}']
    parts += ['--quick'] if options.quick else []
    parts += [f'--extra={shlex.join(extra)}'] if extra else []
    return f'python -m {name} ' + shlex.join(parts)
