"""A search of settings: --sweep.

    --sweep='learning_rate:1e-3,3e-4;dropout:.3,.5'   all combinations of the values
    --sweep=FILE                                      a setting a line: --dropout=.3 --ema=.998

WORKDIR holds the prepared data, sweep.json and its picture, sweep.svg. Each setting has a folder
there, with a run, or with runs of several seeds (--seeds). Settings are compared by the validation
metric that selects epochs, and only the best one is evaluated on the test split.
"""

import contextlib
import dataclasses
import itertools
import shlex
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fame_jax import run_dir
from fame_jax.config import FLAGS, binds
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import show, suggest
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.report import figures_of_runs
from fame_jax.screen import Screen, grid, short
from fame_jax.stages import settings
from fame_jax.stages.context import TRAINED, RunContext, open_run
from fame_jax.stages.members import prepare_for_all, run_seeds

Run = Callable[[RunContext], None]
# Flags of a setting belong to the model, the losses or the training.
SWEPT = ('model', 'loss', 'training', 'finetune')
# Flags that change the metric or the users by which settings are compared.
COMPARES = ('select_on', 'validation_users')
MOST = 1000  # settings


def run_sweep(given: config_flags.Given, stages: Mapping[str, Run], screen: Screen) -> None:
    """Trains every setting, compares them on validation, and evaluates the best one.

    Args:
      given: the flags of the command.
      stages: the functions of the stages of one run.
      screen: the terminal.

    Raises:
      UserError: for settings that do not fit together or to what the folders hold.
    """
    chosen, folder = parse_sweep(given), Path(given.workdir)
    values = {name: value for name, value in given.values.items() if name != 'sweep'}
    prepared = values.get('prepared', str(folder))

    def of_setting(name: str, **more: Any) -> config_flags.Given:
        own = {'workdir': str(folder / name), **chosen[name], **more}
        return dataclasses.replace(given, values={**values, **own})

    wanted: dict[str, tuple[str, ...]] = {}
    for name in chosen:  # all are checked before the first one trains
        wanted[name] = settings.complete(one_of_seeds(of_setting(name)))[0].run.stages
    if any('prepare' in of_one for of_one in wanted.values()):
        prepare_for_all(one_of_seeds(dataclasses.replace(given, values=values)), screen)
    found: dict[str, list[float]] = {}
    for number, name in enumerate(chosen, 1):
        trained = tuple(stage for stage in wanted[name] if stage in ('text', *TRAINED))
        if trained:
            screen.say(f'setting {number} of {len(chosen)}: {name}')
            run_command(of_setting(name, stages=trained, prepared=prepared), stages, screen)
            pairs = [_validation(path) for path in _runs(folder / name)]
            found[name], metric = [value for value, _ in pairs], pairs[0][1]
    if not found:
        return
    ordered = sorted(found, key=lambda name: -statistics.fmean(found[name]))
    best = ordered[0]
    record = {
        'selected_by': f'validation {metric} of the best epoch of the last stage, mean over seeds',
        'best': best,
        'settings': [
            {
                'name': name,
                'flags': {flag: show(value) for flag, value in chosen[name].items()},
                'validation': found[name],
            }
            for name in ordered
        ],
    }
    run_dir.write_json(folder / 'sweep.json', record)
    figures_of_runs.sweep(record, folder / 'sweep.svg')
    print(_table(found, ordered, folder, metric))
    if 'evaluate' in wanted[best]:
        run_command(of_setting(best, stages=('evaluate',), prepared=prepared), stages, screen)


def one_of_seeds(given: config_flags.Given) -> config_flags.Given:
    """The flags of a command without those that only --seeds uses."""
    if not given.get('seeds'):
        return given
    of_all = ('seeds', 'members')
    values = {name: value for name, value in given.values.items() if name not in of_all}
    return dataclasses.replace(given, values=values)


def run_command(given: config_flags.Given, stages: Mapping[str, Run], screen: Screen) -> None:
    """Runs the stages of a command, of a sweep, of several seeds or of one run."""
    if given.get('sweep'):
        run_sweep(given, stages, screen)
    elif given.get('seeds'):
        run_seeds(given, stages, screen)
    else:
        with contextlib.closing(open_run(given, screen=screen)) as context:
            for stage in context.config.run.stages:
                with screen.waiting(stage):
                    stages[stage](context)


def parse_sweep(given: config_flags.Given) -> dict[str, dict[str, Any]]:
    """The settings of --sweep by the names of their folders: flag -> value.

    Raises:
      UserError: for a text or file that names no settings, or a flag that cannot be swept.
    """
    text = given.get('sweep')
    for name in ('distributed', 'out'):
        if name in given.values:
            raise UserError(f'--{name} does not go with --sweep; leave one of them out')
    advice = 'give FLAG:VALUE,VALUE or a file with the flags of a setting on each line'
    with explain_os_errors(f'--sweep={text}', advice):
        is_file = ':' not in text or Path(text).is_file()
        lines = Path(text).read_text(encoding='utf-8').splitlines() if is_file else []
    found: dict[str, dict[str, Any]] = {}
    if is_file:
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith('#'):
                found[f'setting_{number}'] = _parse_flags(shlex.split(line), f'{text}:{number}')
    else:
        parts = [part.partition(':') for part in text.split(';')]
        names = [name.strip() for name, _, _ in parts]
        if len(set(names)) < len(names):
            raise UserError(f'--sweep={text} has a flag twice; give all its values in one place')
        for values in itertools.product(*(values.split(',') for _, _, values in parts)):
            argv = [f'--{name}={value.strip()}' for name, value in zip(names, values)]
            flags = _parse_flags(argv, f'--sweep={text}')
            folder = ','.join(f'{name}={show(value)}' for name, value in flags.items())
            folder = folder.replace('/', '_')
            if folder in found:
                raise UserError(f'--sweep={text} has {folder} twice; give each value once')
            found[folder] = flags
    if not found or len(found) > MOST:
        raise UserError(f'--sweep={text} has {len(found)} settings; give 1 to {MOST}')
    return found


def _parse_flags(argv: list[str], where: str) -> dict[str, Any]:
    """The values of a setting's flags; `where` begins the error for a flag that is none."""
    try:
        values = dict(config_flags.parse(argv).values)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    able = [name for name in FLAGS if binds(name) in SWEPT and name not in COMPARES]
    for name in values:
        if name not in able:
            raise UserError(f'{where}: --{name} cannot be swept; {suggest(name, able)}')
    return values


def _runs(folder: Path) -> list[Path]:
    return run_dir.seed_folders(folder) or [folder]


def _validation(folder: Path) -> tuple[float, str]:
    """The validation metric of the best epoch of a run's last stage, and the metric's name."""
    with contextlib.closing(open_run(config_flags.Given({'workdir': str(folder)}))) as context:
        last = next(stage for stage in reversed(TRAINED) if context.is_trained(stage))
        ranking = 'masked' if context.selects_masked else 'unmasked'
        return context.progress(last)['best_value'], f'NDCG@20, {ranking}'


def _table(found: Mapping[str, list[float]], ordered: list[str], folder: Path, metric: str) -> str:
    """The settings, best first."""
    rows = []
    for name in ordered:
        cell = short(statistics.fmean(found[name]))
        if len(found[name]) > 1:
            cell += f' ± {short(statistics.stdev(found[name]))}'
        rows.append([name, cell])
    table = grid(['setting', f'validation {metric}'], rows, right=(1,))
    return f'\n{table}\n\nThe best is in {folder / ordered[0]}; sweep.json has all.'
