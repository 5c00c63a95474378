"""A search of settings by Optuna: fame_jax search.

    fame_jax search --space=FILE --trials=40 --flagfile=toys.cfg --workdir=runs/toys_search

FILE has a flag on each line, with its values:

    learning_rate 1e-4..1e-2 log     numbers between the two, by their logarithm
    dropout .1..0.7                  numbers between the two
    num_experts 2..16                whole numbers, where the flag has them
    num_heads 1|2|4                  one of these

Optuna (https://optuna.org) proposes settings. Each is a trial: a run in WORKDIR/trial_0 and so on,
or runs of several seeds. Trials are compared by the validation metric that selects epochs, and a
trial ends early where the median of the earlier ones is better at the same epoch. No trial is
evaluated on the test split: WORKDIR/best.cfg has the flags of the best one, to make a run with.

The same command goes on where it was interrupted, and with more --trials it adds some.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from fame_jax import run_dir
from fame_jax.config import FLAGS, binds
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import show, suggest
from fame_jax.errors import ArgumentParser, DivergedError, UserError, explain_os_errors
from fame_jax.report import figures_of_runs
from fame_jax.screen import Screen, short
from fame_jax.stages import STAGES
from fame_jax.stages.context import TRAINED, RunContext, open_run
from fame_jax.stages.members import of_seed, parse_seeds, prepare_for_all, run_stages
from fame_jax.stages.sweep import (
    describe_metric,
    epochs_of,
    group_runs,
    name_of_setting,
    rungs,
    validation_of,
)
from fame_jax.stages.sweep_settings import COMPARES, OF_ALL, SWEPT, refuse_idle

if TYPE_CHECKING:
    import optuna

RUNGS = 27, 3  # the epochs at which a trial can end early: 1/27, 1/9 and 1/3 of the greatest number
TOGETHER = 8  # trials that are proposed at a time where one program trains several
STARTUP = 4  # trials of which none ends early
STUDY = 'search'


@dataclasses.dataclass(frozen=True)
class Choice:
    """The values of one flag.

    Fields:
      values: one of these texts; () where a range is given.
      low, high: of a range, both allowed.
      is_log: whether the logarithm is uniform.
      is_whole: whether only whole numbers are allowed.
    """

    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False

    def suggest(self, trial: 'optuna.Trial', name: str) -> Any:
        """The value that a trial proposes for a flag."""
        if self.values:
            return trial.suggest_categorical(name, list(self.values))
        if self.is_whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.is_log)
        # Few digits, so that the name of a setting can be read and typed.
        return float(f'{trial.suggest_float(name, self.low, self.high, log=self.is_log):.3g}')


def parse_space(path: str) -> dict[str, Choice]:
    """The flags of a file and their values.

    Raises:
      UserError: naming the line that is no flag with values, or a flag that cannot be searched.
    """
    with explain_os_errors(
        f'--space={path}', 'give a file with a flag and its values on each line'
    ):
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    able = [name for name in FLAGS if binds(name) in SWEPT and name not in COMPARES]
    space: dict[str, Choice] = {}
    for number, line in enumerate(lines, 1):
        where, words = f'{path}:{number}', line.split('#')[0].split()
        if not words:
            continue
        name = words[0].lstrip('-')
        if name not in able:
            raise UserError(f'{where}: --{name} cannot be searched; {suggest(name, able)}')
        if name in space:
            raise UserError(f'{where}: {name} stands there twice; give each flag once')
        space[name] = _parse_choice(name, words[1:], where)
    if not space:
        raise UserError(f'{path} has no flag; write one with its values on each line')
    return space


def _parse_choice(name: str, words: Sequence[str], where: str) -> Choice:
    kind, texts = FLAGS[name].metadata['kind'], ''.join(words[:1])
    advice = f'{where}: write {name} LOW..HIGH, {name} LOW..HIGH log, or {name} A|B|C'
    if '..' not in texts:
        values = tuple(texts.split('|'))
        if len(words) != 1 or len(values) < 2 or len(set(values)) < len(values):
            raise UserError(f'{advice}, each value once')
        for value in values:
            try:
                config_flags.parse([f'--{name}={value}'])
            except UserError as error:
                raise UserError(f'{where}: {error}') from error
        return Choice(values)
    try:
        low, high = map(float, texts.split('..'))
    except ValueError:
        low = high = math.nan
    is_log = list(words[1:]) == ['log']
    if kind not in (int, float) or not low < high or (len(words) > 1 and not is_log):
        raise UserError(f'{advice}, with LOW below HIGH')
    if is_log and low <= 0:
        raise UserError(f'{where}: {name} from {low:g} has no logarithm; begin above 0')
    if kind is int and not (low.is_integer() and high.is_integer()):
        raise UserError(f'{where}: {name} is a whole number; give two of them')
    for value in (low, high):
        try:
            config_flags.parse([f'--{name}={int(value) if kind is int else value}'])
        except UserError as error:
            raise UserError(f'{where}: {error}') from error
    return Choice((), low, high, is_log, kind is int)


class Search:
    """A study of Optuna in WORKDIR, and the runs of its trials.

    Attributes:
      folder: WORKDIR.
      given: the flags of the runs, without those of a trial.
      space: the flags that are searched.
    """

    def __init__(
        self, given: config_flags.Given, space: Mapping[str, Choice], screen: Screen, seed: int = 0
    ):
        """Opens the study of the folder, or begins one.

        Raises:
          UserError: where Optuna is missing, or the folder has a search of something else.
        """
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "fame_jax search needs Optuna; pip install 'fame_jax[search]'"
            ) from error
        self.folder, self.given, self.space, self.screen = Path(given.workdir), given, space, screen
        self.seeds = parse_seeds(given) if given.get('seeds') else []
        run_dir.refuse_other_kind(self.folder, 'search')
        self._states = optuna.trial.TrialState
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with explain_os_errors(f'making the folder {self.folder}', 'choose another --workdir'):
            self.folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(self.folder / run_dir.STUDY))
        self.study = optuna.create_study(
            study_name=STUDY,
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
            direction='maximize',
            load_if_exists=True,
        )
        about = {
            'space': {name: dataclasses.asdict(choice) for name, choice in space.items()},
            'flags': {
                name: show(value)
                for name, value in given.values.items()
                if binds(name) and name != 'workdir'
            },
            'seeds': self.seeds,
        }
        stored = self.study.user_attrs.get('about')
        if stored is None:
            self.study.set_user_attr('about', about)
        elif stored != json.loads(json.dumps(about)):
            raise UserError(
                f'{self.folder} has a search of other flags, values or seeds; choose another '
                '--workdir'
            )

    def run(self, trials: int, together: int) -> None:
        """Makes trials until there are so many; `together` are proposed at a time."""
        import optuna

        self._prepare()
        with run_dir.lock(self.folder):
            self._run(optuna, trials, together)

    def _run(self, optuna: Any, trials: int, together: int) -> None:
        while True:
            # Those of an interrupted call come first.
            begun = [
                optuna.trial.Trial(self.study, trial._trial_id)
                for trial in self.study.get_trials(states=[self._states.RUNNING])
            ]
            missing = min(together, trials - len(self.study.trials))
            batch = begun[:together] or [self.study.ask() for _ in range(max(missing, 0))]
            if not batch:
                break
            self._train(batch)
            self.write()

    def _prepare(self) -> None:
        values = {name: value for name, value in self.given.values.items() if name not in OF_ALL}
        prepare_for_all(dataclasses.replace(self.given, values=values), self.screen)

    def _flags(self, trial: 'optuna.Trial') -> dict[str, Any]:
        """The flags of a trial, as a setting of --sweep has them."""
        proposed = {name: choice.suggest(trial, name) for name, choice in self.space.items()}
        argv = [f'--{name}={value}' for name, value in proposed.items()]
        return dict(config_flags.parse(argv).values)

    def _open(self, name: str, trial: 'optuna.Trial') -> list[RunContext]:
        """The runs of a trial, one for each seed."""
        values = {n: value for n, value in self.given.values.items() if n not in OF_ALL}
        flags = self._flags(trial)
        values |= flags
        values['workdir'] = str(self.folder / name)
        values.setdefault('prepared', str(self.folder))
        setting = dataclasses.replace(self.given, values=values)
        opened = open_run(of_seed(setting, self.seeds[0]) if self.seeds else setting)
        stages = tuple(s for s in opened.config.run.stages if s in ('text', *TRAINED))
        opened.close()
        refuse_idle(flags, opened.model)
        values['stages'] = stages
        setting = dataclasses.replace(self.given, values=values)
        every = [of_seed(setting, seed) for seed in self.seeds] or [setting]
        return [open_run(of_run, screen=self.screen) for of_run in every]

    def _train(self, batch: Sequence['optuna.Trial']) -> None:
        """Trains trials together, in rungs, after each of which those that lag behind end."""
        with contextlib.ExitStack() as stack:
            runs: dict[str, list[RunContext]] = {}
            of_name = {f'trial_{trial.number}': trial for trial in batch}
            for name, trial in of_name.items():
                try:
                    runs[name] = self._open(name, trial)
                except UserError as error:  # the space has settings that no run can have
                    self._fail(name, trial, error)
                    continue
                for context in runs[name]:
                    stack.enter_context(contextlib.closing(context))
                flags = ' '.join(f'--{n}={show(v)}' for n, v in self._flags(trial).items())
                self.screen.say(f'{name}: {flags}')
            self._train_rungs(runs, of_name)

    def _train_rungs(
        self, runs: dict[str, list[RunContext]], trials: Mapping[str, 'optuna.Trial']
    ) -> None:
        last = {
            name: [s for s in contexts[0].config.run.stages if s in TRAINED][-1]
            for name, contexts in runs.items()
        }
        for number in range(len(rungs(*RUNGS, 1)) + 1):
            for group in group_runs(runs, self.given.get('members')):
                self._train_group({name: runs[name] for name in group}, last, number, trials)
            for name in list(runs):
                if trials[name].number in self._ended():
                    runs.pop(name)
                    continue
                value, trial = statistics.fmean(map(validation_of, runs[name])), trials[name]
                ended = all(context.is_finished(last[name]) for context in runs[name])
                if ended:
                    trial.set_user_attr('validation', list(map(validation_of, runs[name])))
                    trial.set_user_attr('epochs', list(map(epochs_of, runs[name])))
                    self.study.tell(trial, value)
                    self.screen.say(f'{name}: validation {short(value)}')
                else:
                    trial.report(value, number)
                    if trial.should_prune():
                        trial.set_user_attr('validation', list(map(validation_of, runs[name])))
                        trial.set_user_attr('epochs', list(map(epochs_of, runs[name])))
                        self.study.tell(trial, state=self._states.PRUNED)
                        self.screen.say(f'{name}: validation {short(value)}, ended early')
                if ended or trials[name].number in self._ended():
                    for context in runs.pop(name):
                        context.close()

    def _train_group(
        self,
        runs: Mapping[str, Sequence[RunContext]],
        last: Mapping[str, str],
        number: int,
        trials: Mapping[str, 'optuna.Trial'],
    ) -> None:
        """Trains runs up to a rung, each by itself where one diverges, so that the others go on."""

        def train(names: Sequence[str]) -> None:
            first, own = runs[names[0]][0], last[names[0]]
            contexts = [context for name in names for context in runs[name]]
            until = rungs(*RUNGS, first.limits(own).epochs)
            before = tuple(s for s in first.config.run.stages if s != own)
            about = STAGES, self.given.get('members'), name_of_setting
            if number == 0:
                run_stages(contexts, before, *about)
            to = until[number] if number < len(until) else None
            run_stages(contexts, (own,), *about, to)

        names = list(runs)
        try:
            train(names)
        except DivergedError:
            for name in names:
                try:
                    train([name])
                except DivergedError as error:
                    self._fail(name, trials[name], error)

    def _fail(self, name: str, trial: 'optuna.Trial', error: UserError) -> None:
        self.study.tell(trial, state=self._states.FAIL)
        self.screen.say(f'{name}: cannot be trained: {error}')

    def _ended(self) -> set[int]:
        return {t.number for t in self.study.trials if t.state.is_finished()}

    def write(self) -> dict[str, Any] | None:
        """Writes sweep.json, its picture, and best.cfg; the record, or None without a trial."""
        done = [t for t in self.study.trials if 'validation' in t.user_attrs]
        complete = [t for t in done if t.state == self._states.COMPLETE]
        if not complete:
            return None
        names = {t.number: f'trial_{t.number}' for t in done}
        mean = {t.number: statistics.fmean(t.user_attrs['validation']) for t in done}
        is_early = {t.number: t.state == self._states.PRUNED for t in done}
        done.sort(key=lambda t: (is_early[t.number], -mean[t.number]))
        best = done[0]
        opened = self._open(names[best.number], best)
        metric = describe_metric(opened[0])
        for context in opened:
            context.close()
        record = {
            'selected_by': f'validation {metric} of the best epoch of the last stage, mean over '
            'seeds',
            'best': names[best.number],
            'settings': [
                {
                    'name': names[t.number],
                    'flags': {name: self._shown(name, t.params[name]) for name in self.space},
                    'validation': t.user_attrs['validation'],
                    'epochs': t.user_attrs['epochs'],
                    'ended_early': is_early[t.number],
                }
                for t in done
            ],
        }
        run_dir.write_json(self.folder / 'sweep.json', record)
        figures_of_runs.sweep(record, self.folder / 'sweep.svg')
        own = {
            name: show(value)
            for name, value in self.given.values.items()
            if binds(name) and name not in self.space
        }
        flags = own | record['settings'][0]['flags']
        lines = [
            f'# The best of {len(done)} settings of a search by validation {metric}: '
            f'{short(mean[best.number])}.',
            *(f'--{name}={value}' for name, value in flags.items()),
        ]
        run_dir.write_text(self.folder / 'best.cfg', '\n'.join(lines) + '\n')
        return record

    def _shown(self, name: str, value: Any) -> str:
        choice = self.space[name]
        return str(value) if choice.values or choice.is_whole else str(float(f'{value:.3g}'))


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, config_flags.Given]:
    """The arguments of the search, and the flags of its runs.

    Raises:
      UserError: for an unknown flag or an impossible value.
    """
    parser = ArgumentParser('fame_jax search', description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = 'All other flags are those of a run; see fame_jax --help.'
    parser.add_argument('--space', required=True, help='file with a flag and its values on a line')
    parser.add_argument('--trials', type=int, default=40, help='settings in all (default: 40)')
    parser.add_argument(
        '--together', type=int, default=0, help='settings that are proposed at a time; 0: by device'
    )
    parser.add_argument('--search_seed', type=int, default=0, help="of Optuna's proposals")
    arguments, rest = parser.parse_known_args(list(argv))
    if arguments.trials < 1 or arguments.together < 0:
        raise UserError('--trials must be at least 1, and --together at least 0')
    given = config_flags.parse(rest)
    for name in ('sweep', 'sweep_halving', 'stages', 'distributed', 'out', 'append'):
        if name in given.values:
            raise UserError(f'--{name} does not go with fame_jax search; leave it out')
    if 'workdir' not in given.values:
        raise UserError('fame_jax search needs --workdir=FOLDER')
    return arguments, given


def main(argv: Sequence[str]) -> int:
    """Searches, and prints the best setting.

    Raises:
      UserError: for a mistake of the user.
      Interrupted: after a signal; the same command goes on.
    """
    arguments, given = parse_arguments(argv)
    space = parse_space(arguments.space)
    for name in sorted(given.typed & space.keys()):
        raise UserError(
            f'--{name}={show(given.get(name))} has no effect, since {arguments.space} has its '
            'values; leave one of them out'
        )
    search = Search(given, space, Screen(given.get('progress')), arguments.search_seed)
    how = given.get('members')
    several = how == 'vmap' or (how == 'auto' and jax.default_backend() != 'cpu')
    search.run(arguments.trials, arguments.together or (TOGETHER if several else 1))
    record = search.write()
    if record is None:
        raise UserError('no setting of the space could be trained; see the lines above')
    best = record['settings'][0]
    flags = ' '.join(f'--{name}={shlex.quote(value)}' for name, value in best['flags'].items())
    print(
        f'\n{len(record["settings"])} settings; the best, {best["name"]}, has validation '
        f'{short(statistics.fmean(best["validation"]))}:\n\n  {flags}\n\n'
        f'{search.folder / "best.cfg"} has it with all other flags; sweep.json and sweep.svg '
        'have all settings.'
    )
    return 0
