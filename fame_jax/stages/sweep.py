"""A search of settings: --sweep.

    --sweep='learning_rate:1e-3,3e-4;dropout:.3,.5'   all combinations of the values
    --sweep=FILE                                      a setting a line: --dropout=.3 --ema=.998
    --sweep_halving=3                                 the worse two thirds end early, repeatedly

WORKDIR holds the prepared data, sweep.json and its picture, sweep.svg. Each setting has a folder
there, named by its flags, with a run, or with runs of several seeds (--seeds). Settings are
compared by the validation metric that selects epochs, and only the best one is evaluated on the
test split. Settings of earlier commands in WORKDIR are compared too.

With --members=vmap, the default on an accelerator, settings that differ in numbers of the program
alone (rates, dropouts, temperatures, weights of terms, shares of labels) train together in one
program, with all their seeds; other settings have a program of their own.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fame_jax import run_dir
from fame_jax.config import SECTIONS
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import show
from fame_jax.errors import UserError
from fame_jax.models import registry
from fame_jax.report import figures_of_runs
from fame_jax.screen import Screen, grid, short
from fame_jax.stages import settings
from fame_jax.stages.context import TRAINED, RunContext, open_run
from fame_jax.stages.members import (
    choose_how,
    other_seeds,
    parse_seeds,
    prepare_for_all,
    run_seeds,
    run_stages,
)
from fame_jax.stages.sweep_settings import (
    Command,
    find_folders,
    parse_sweep,
    read_settings,
    refuse_idle,
)
from fame_jax.stages.train import numbers

Run = Callable[[RunContext], None]
# Flags in which the runs of one program may differ: seeds, folders, and those of `train.numbers`.
# The model's options are compared by themselves.
FREE = (
    *('seed', 'workdir', 'backbone', 'learning_rate', 'finetune_learning_rate', 'weight_decay'),
    *('ema', 'future_targets', 'finetune_future_targets', 'seen_weight', 'finetune_dropout'),
    *(item.name for item in dataclasses.fields(SECTIONS['model'])),
)
TRAINS = {'prepare', 'text', *TRAINED}  # stages of which a sweep has one at least
HALVING = 'halving.json'  # in WORKDIR: which settings went on


def run_sweep(given: config_flags.Given, stages: Mapping[str, Run], screen: Screen) -> None:
    """Trains every setting, compares them on validation, and evaluates the best one.

    Args:
      given: the flags of the command.
      stages: the functions of the stages of one run.
      screen: the terminal.

    Raises:
      UserError: for settings that do not fit together or to what the folders hold.
    """
    parsed, folder = parse_sweep(given), Path(given.workdir)
    run_dir.refuse_other_kind(folder, 'sweep')
    seeds = parse_seeds(given) if given.get('seeds') else []
    command, before = Command(given, folder, seeds), read_settings(folder)
    prepared = command.of_all.values.get('prepared', str(folder))
    chosen = find_folders(parsed, before, command)
    earlier = {name: flags for name, flags in before.items() if name not in chosen}
    every = chosen | earlier
    wanted: dict[str, tuple[str, ...]] = {}
    for name, flags in every.items():  # all are checked before the first one trains
        config, model = settings.complete(command.of_runs(name, flags)[0])
        refuse_idle(flags, model)
        wanted[name] = config.run.stages
    idle = next((of_one for of_one in wanted.values() if not TRAINS & set(of_one)), ())
    if idle:
        raise UserError(
            f'--stages={",".join(idle)} trains nothing, and a sweep compares what it trains; leave '
            '--stages out, or give the folder of one setting as --workdir'
        )
    if any('prepare' in of_one for of_one in wanted.values()):
        prepare_for_all(command.of_all, screen)
    trained = {n: tuple(s for s in w if s in ('text', *TRAINED)) for n, w in wanted.items()}
    trained = {name: of_one for name, of_one in trained.items() if of_one}
    with contextlib.ExitStack() as stack:
        runs: dict[str, list[RunContext]] = {}
        for name, of_one in trained.items():
            flags = command.of_runs(name, every[name], stages=of_one, prepared=prepared)
            runs[name] = [open_run(of_run, screen=screen) for of_run in flags]
            for context in runs[name]:
                stack.enter_context(contextlib.closing(context))
        here = {name: contexts for name, contexts in runs.items() if name in chosen}
        if not here:
            return
        _train(here, stages, given, folder)
        if not all(set(of_one) & set(TRAINED) for of_one in trained.values()):
            return
        notes = _take_earlier(runs, here, command)
        found = {name: [validation_of(context) for context in runs[name]] for name in runs}
        epochs = {name: [epochs_of(context) for context in runs[name]] for name in runs}
        early = {name: any(map(ends_early, contexts)) for name, contexts in runs.items()}
        metric = describe_metric(next(iter(runs.values()))[0])
    # A setting that was ended early is below all that went on.
    ordered = sorted(found, key=lambda name: (early[name], -statistics.fmean(found[name])))
    best = ordered[0]
    record = {
        'selected_by': f'validation {metric} of the best epoch of the last stage, mean over seeds',
        'best': best,
        'settings': [
            {
                'name': name,
                'flags': {flag: show(value) for flag, value in every[name].items()},
                'validation': found[name],
                'epochs': epochs[name],
                'ended_early': early[name],
            }
            for name in ordered
        ],
    }
    run_dir.write_json(folder / run_dir.SWEEP, record)
    figures_of_runs.sweep(record, folder / 'sweep.svg')
    print('\n'.join([_table(record, folder, metric), *notes]))
    if 'evaluate' in wanted[best]:
        more = {'seeds': given.get('seeds')} if seeds else {}
        run_command(
            command.of_setting(best, every[best], stages=('evaluate',), prepared=prepared, **more),
            stages,
            screen,
        )


def _take_earlier(
    runs: dict[str, list[RunContext]], here: Mapping[str, Sequence[RunContext]], command: Command
) -> list[str]:
    """Takes unfinished settings of earlier commands out of `runs`; lines about all that are there.

    Args:
      runs: of each setting that is compared, one a seed.
      here: those of this command, which are trained.
      command: its flags.
    """
    first = next(iter(here.values()))[0]
    counted: list[str] = []
    left_out: dict[str, str] = {}
    for name in [name for name in runs if name not in here]:
        for context in runs[name]:
            context.share(first, programs=False, rankers=False)
        last = [stage for stage in runs[name][0].config.run.stages if stage in TRAINED][-1]
        if all(context.is_finished(last) for context in runs[name]):
            counted.append(name)
        else:
            del runs[name]
            left_out[name] = 'it is not trained to the end; add it to --sweep'
    for path in run_dir.setting_folders(command.folder):
        if path.name not in runs:
            left_out.setdefault(path.name, 'sweep.json lacks it; add it to --sweep')
    lines = [f'{name} is left out: {why}.' for name, why in left_out.items()]
    if counted:
        lines.insert(0, f'Settings of earlier commands are compared too: {", ".join(counted)}.')
    more = {seed for name in runs for seed in other_seeds(command.folder / name, command.seeds)}
    if more:
        numbers = ', '.join(map(str, sorted(more)))
        lines.append(f'Other seeds of the settings are left out: {numbers}; add them to --seeds.')
    return lines


def _train(
    runs: Mapping[str, Sequence[RunContext]],
    stages: Mapping[str, Run],
    given: config_flags.Given,
    folder: Path,
) -> None:
    """Trains all settings; with --sweep_halving in rungs, after which the worse ones end.

    Args:
      runs: the runs of each setting, one a seed.
      stages: the functions of the stages of one run.
      given: the flags of the command.
      folder: of the sweep, where the decisions are kept, so that an interrupted one goes on.
    """
    how, eta = given.get('members'), given.get('sweep_halving')
    last = {
        name: [s for s in contexts[0].config.run.stages if s in TRAINED][-1:]
        for name, contexts in runs.items()
    }

    def run_all(names: Sequence[str], is_last: bool, rung: int | None = None) -> None:
        for group in group_runs({name: runs[name] for name in names}, how):
            first = runs[group[0]][0]
            own = tuple(last[group[0]])
            wanted = own if is_last else tuple(s for s in first.config.run.stages if s not in own)
            until = (
                None if rung is None else rungs(len(runs), eta, first.limits(own[0]).epochs)[rung]
            )
            contexts = [context for name in group for context in runs[name]]
            run_stages(contexts, wanted, stages, how, name_of_setting, until)

    names = list(runs)
    run_all(names, is_last=False)
    if eta and all(last.values()):
        decided = _read_decisions(folder, eta, names)
        for rung in range(len(rungs(len(runs), eta, 1))):
            if rung == len(decided):
                run_all(names, is_last=True, rung=rung)
                value = {n: statistics.fmean(map(validation_of, runs[n])) for n in names}
                names = sorted(names, key=lambda n: -value[n])[: -(-len(runs) // eta ** (rung + 1))]
                decided.append(names)
                record = {'halving': eta, 'settings': list(runs), 'kept': decided}
                run_dir.write_json(folder / HALVING, record)
            names = [name for name in runs if name in decided[rung]]
            runs[names[0]][0].screen.say(
                f'rung {rung + 1}: {len(names)} of {len(runs)} settings go on: {", ".join(names)}'
            )
    run_all(names, is_last=True)


def rungs(settings: int, eta: int, epochs: int) -> list[int]:
    """The epochs after which settings are compared and all but the best 1/eta of them end.

    As successive halving (arXiv 1502.07943): each rung has eta times the epochs of the one before,
    and there are as many as leave one setting.
    """
    number = 0
    while eta ** (number + 1) <= settings:
        number += 1
    return [max(1, epochs // eta ** (number - rung)) for rung in range(number)]


def _read_decisions(folder: Path, eta: int, names: Sequence[str]) -> list[list[str]]:
    """The settings that went on after each rung of an interrupted sweep.

    Raises:
      UserError: when the folder has a sweep of other settings.
    """
    path = folder / HALVING
    if not path.is_file():
        return []
    stored = run_dir.read_json(path)
    if stored.get('halving') != eta or sorted(stored.get('settings', [])) != sorted(names):
        raise UserError(f'{path} is of a sweep of other settings; choose another --workdir')
    return stored['kept']


def group_runs(runs: Mapping[str, Sequence[RunContext]], how: str) -> list[list[str]]:
    """The settings that one program can train, since they differ in its numbers alone.

    Where runs train one after another, each setting is a group.
    """
    groups: dict[Any, list[str]] = {}
    for name, contexts in runs.items():
        first = contexts[0]
        trained = [stage for stage in first.config.run.stages if stage in TRAINED]
        together = bool(trained) and all(choose_how(first, s, how) == 'vmap' for s in trained)
        groups.setdefault(_program_key(first) if together else name, []).append(name)
    return list(groups.values())


def _program_key(context: RunContext) -> str:
    """A text that is the same for runs that differ in their seeds and in `numbers` alone."""
    parts: list[Any] = [context.config.run.stages]
    parts.append({name: value for name, value in context.config.flat().items() if name not in FREE})
    for stage in TRAINED:
        module, found = context.module(stage), numbers(context, stage)
        values = registry.values(module)
        parts += [type(module), {name: v for name, v in values.items() if name not in found}]
        parts.append(jax.tree.structure(found))
    return repr(parts)


def name_of_setting(context: RunContext) -> str:
    """The folder of a setting, and its seed where there are several."""
    folder = context.folder
    if folder.name == f'seed_{context.config.run.seed}':
        return f'{folder.parent.name}, seed {context.config.run.seed}'
    return folder.name


def run_command(given: config_flags.Given, stages: Mapping[str, Run], screen: Screen) -> None:
    """Runs the stages of a command, of a sweep, of several seeds or of one run.

    Raises:
      UserError: for several runs with --append, which updates one.
    """
    for name in ('sweep', 'seeds'):
        if given.get(name) and given.get('append'):
            raise UserError(
                f'--{name}={show(given.get(name))} is not for --append={given.get("append")}, '
                'which updates one run; leave it out, and update each run in a folder of its own'
            )
    if given.get('sweep'):
        run_sweep(given, stages, screen)
    elif given.get('seeds'):
        run_seeds(given, stages, screen)
    else:
        with contextlib.closing(open_run(given, screen=screen)) as context:
            for stage in context.config.run.stages:
                with screen.waiting(stage):
                    stages[stage](context)


def validation_of(context: RunContext) -> float:
    """The validation metric of the best epoch of a run's last stage."""
    return _progress(context)['best_value']


def epochs_of(context: RunContext) -> int:
    """The epochs that a run's last stage has had."""
    return _progress(context)['epoch']


def ends_early(context: RunContext) -> bool:
    """Whether a run's last stage ended before its limits."""
    return not context.is_finished(_last(context))


def _last(context: RunContext) -> str:
    return next(stage for stage in reversed(TRAINED) if context.is_trained(stage))


def _progress(context: RunContext) -> dict[str, Any]:
    return context.progress(_last(context))


def describe_metric(context: RunContext) -> str:
    """The metric by which settings are compared, in words."""
    return f'NDCG@20, {"masked" if context.selects_masked else "unmasked"}'


def _table(record: Mapping[str, Any], folder: Path, metric: str) -> str:
    """The settings, best first."""
    rows, early = [], any(setting['ended_early'] for setting in record['settings'])
    for setting in record['settings']:
        values = setting['validation']
        cell = short(statistics.fmean(values))
        if len(values) > 1:
            cell += f' ± {short(statistics.stdev(values))}'
        epochs = sorted(set(setting['epochs']))
        of_epochs = f'{epochs[0]} to {epochs[-1]}' if len(epochs) > 1 else f'{epochs[0]}'
        row = [setting['name'], cell, of_epochs]
        rows.append([*row, 'ended early' if setting['ended_early'] else ''] if early else row)
    heading = ['setting', f'validation {metric}', 'epochs', *([''] if early else [])]
    table = grid(heading, rows, right=(1, 2))
    return f'\n{table}\n\nThe best is in {folder / record["best"]}; sweep.json has all.'
