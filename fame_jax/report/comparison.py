"""Several runs side by side: the record that `fame_jax compare` shows, from the runs' folders.

Only runs of equal data, split, candidates, ties and selecting protocol stand in one section; a
model that was trained in several splits of the same data stands in a table of splits too. A folder
of several seeds is one run. Intervals are paired over users; a user's NDCG is the mean over the
seeds of a run.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import run_dir
from fame_jax.config import FLAGS, binds
from fame_jax.config.fields import show
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.evaluation import significance
from fame_jax.evaluation.metrics import PROTOCOLS
from fame_jax.report import collect, figures_of_runs
from fame_jax.report.collect import SELECTION, Grouping, RunReport
from fame_jax.report.tables import spread, table_name

SWEEP = 'sweep.json'
K = 10  # cut-off of the NDCG of the tests
# Parts of a protocol card that are equal in a section, besides the data's fingerprint.
FACTS = ('split', 'candidates', 'masked', 'unmasked', 'ties', 'select_on')
UNTRAINED = ('popularity', 'item_graph')
OF_SPLIT = ('seed', 'split', 'split_at', 'split_targets')  # flags that a table of splits ignores


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, or the runs of several seeds, which count as one.

    Attributes:
      name: the folder's, or its path where another run has that name.
      folder: of the run, or of all its seeds.
      reports: the record of each seed.
    """

    name: str
    folder: Path
    reports: tuple[RunReport, ...]

    @property
    def first(self) -> RunReport:
        """The record of the first seed."""
        return self.reports[0]

    @property
    def stage(self) -> str:
        """The last stage with results, whose model is compared."""
        return self.first.stage

    @property
    def model(self) -> str:
        """The model and its settings."""
        return self.first.names[self.stage]

    @property
    def seeds(self) -> list[Any]:
        """The seed of each record."""
        return [report.card.get('seed') for report in self.reports]

    def spread(self, *path: str, stage: str = '') -> dict[str, Any] | None:
        """Mean, deviation and values over seeds of a figure, such as ('test', 'masked', 'mrr').

        None where a seed lacks it.
        """
        values = []
        for report in self.reports:
            found: Any = report.results.get(stage or self.stage, {})
            for name in path:
                found = found.get(name) if isinstance(found, Mapping) else None
            values.append(found)
        return spread(values) if all(isinstance(v, int | float) for v in values) else None

    def ranks(self, protocol: str, stage: str = '') -> np.ndarray | None:
        """Test ranks of every seed, int [S, U]; None where a seed has no ranks.npz."""
        found = [report.ranks.get(stage or self.stage, {}) for report in self.reports]
        if any(protocol not in of_stage for of_stage in found):
            return None
        return np.stack([of_stage[protocol] for of_stage in found])


@dataclasses.dataclass(frozen=True)
class Test:
    """A run's NDCG@10 minus that of the reference.

    Attributes:
      interval: paired over users, of the means over seeds.
      each: the difference of each seed that both have, where they have several.
    """

    interval: significance.PairedInterval
    each: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """Runs that can be compared.

    Attributes:
      title: the data set, and where another section has it too, the difference.
      runs: in the order of the command.
      reference: the run against which the others are tested.
      tests: name of a run -> protocol -> its test.
      baselines: of UNTRAINED, likewise; their figures are those of the reference's results.
      settings: (flag, its value in each run), only those that differ.
      groupings: users by length and popularity; rows as `groups.group_metrics` returns them, by
        name of the run.
      notes: one line each.
    """

    title: str
    runs: Sequence[Run]
    reference: Run
    tests: Mapping[str, Mapping[str, Test]] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Test]] = dataclasses.field(default_factory=dict)
    settings: Sequence[tuple[str, Sequence[str]]] = ()
    groupings: Sequence[Grouping] = ()
    notes: Sequence[str] = ()

    @property
    def protocol(self) -> str:
        """The protocol by which best epochs were selected."""
        return self.reference.first.protocol

    @property
    def best(self) -> Run | None:
        """The best run by the mean validation NDCG@20; None where a run lacks it."""
        found = [run.spread('validation', self.protocol, SELECTION) for run in self.runs]
        if any(value is None for value in found):
            return None
        return max(zip(self.runs, found), key=lambda pair: pair[1]['mean'])[0]

    @property
    def untrained(self) -> list[str]:
        """The baselines that the reference's results have."""
        return [name for name in UNTRAINED if name in self.reference.first.results]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its sweep.json."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def best(self) -> Path:
        """The folder of the best setting."""
        return self.folder / self.record['best']


@dataclasses.dataclass(frozen=True)
class Row:
    """A model in a table of splits.

    Attributes:
      title: the model's name.
      runs: its run in each section; None where it has none.
      stage: the stage with its figures, or the name of a baseline in the results of those runs.
    """

    title: str
    runs: Sequence[Run | None]
    stage: str


@dataclasses.dataclass(frozen=True)
class Splits:
    """Models with the same settings in several splits of the same data.

    Attributes:
      sections: one of each split.
      rows: a model each, the baselines last.
    """

    sections: Sequence[Section]
    rows: Sequence[Row]

    @property
    def names(self) -> list[str]:
        """The split of each section."""
        return [split_name(section.reference.first.card) for section in self.sections]

    @property
    def targets(self) -> list[int]:
        """The number of test targets of each section."""
        return [collect.count_targets(one.reference.first.card) for one in self.sections]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sections of runs, tables of splits, sweeps, and lines about folders that are left out."""

    sections: Sequence[Section]
    sweeps: Sequence[Sweep] = ()
    notes: Sequence[str] = ()
    splits: Sequence[Splits] = ()


def compare(folders: Sequence[str | Path], against: str = '') -> Comparison:
    """Reads the runs and compares them.

    Args:
      folders: of runs, of several seeds, or of sweeps, which stand for their best setting.
      against: the folder or name of the reference of its section; '': the first run of each.

    Raises:
      UserError: when a folder does not exist, stands there twice or is damaged, none has results,
        or no run or more than one is called `against`.
    """
    notes: list[str] = []
    runs, sweeps = _read_all([Path(folder) for folder in folders], notes)
    if not runs and not sweeps:
        raise UserError('; '.join(notes) or 'name the folders of the runs to compare')
    chosen = _named(runs, sweeps, against) if against else None
    sections: dict[tuple, list[Run]] = {}
    for run in runs:
        sections.setdefault(_key(run.first), []).append(run)
    first_key = next(iter(sections), ())
    titles: dict[str, int] = {}
    found = []
    for key, members in sections.items():
        card = members[0].first.card
        title = table_name(str(card['dataset'].get('name', 'data')), card.get('time_split'))
        titles[title] = titles.get(title, 0) + 1
        if titles[title] > 1:
            title = f'{title} ({titles[title]})'
        if key != first_key:
            names = ', '.join(run.name for run in members)
            notes.append(
                f'{names}: other {_difference(key, first_key)} than {runs[0].name}; figures of '
                'different sections cannot be compared'
            )
        reference = chosen if chosen in members else members[0]
        found.append(_section(title, members, reference))
    return Comparison(found, sweeps, notes, _splits(found))


def _key(report: RunReport) -> tuple:
    """What runs of one section share."""
    card = report.card
    facts = [str(card.get(name, '')) for name in FACTS[:-1]]
    return (_of_data(card), *facts, report.protocol)


def _difference(key: tuple, first: tuple) -> str:
    names = ('data', *FACTS)
    return ', '.join(name for name, a, b in zip(names, key, first) if a != b)


# Reading.


def _read_all(folders: Sequence[Path], notes: list[str]) -> tuple[list[Run], list[Sweep]]:
    """The runs and sweeps; a line for each folder without results."""
    folders = [path.parent if path.name == 'results.json' else path for path in folders]
    sweeps: list[Sweep] = []
    found: list[tuple[Path, tuple[RunReport, ...]]] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f'{folder} is no folder of a run; check the path')
        if (folder / SWEEP).is_file():
            sweep = Sweep(folder, run_dir.read_json(folder / SWEEP))
            try:
                figures_of_runs.read_settings(sweep.record)
            except UserError as error:
                raise UserError(f'{folder}: {error}') from error
            sweeps.append(sweep)
            folder = sweep.best
        reports = _read_run(folder, notes)
        if reports:
            found.append((folder, reports))
    resolved = [folder.resolve() for folder, _ in found]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f'{found[place][0]} is named twice; leave one out')
    names = [folder.resolve().name for folder, _ in found]
    return [
        Run(name if names.count(name) == 1 else str(folder), folder, reports)
        for name, (folder, reports) in zip(names, found)
    ], sweeps


def _read_run(folder: Path, notes: list[str]) -> tuple[RunReport, ...]:
    """The record of a run, or of each of its seeds; () and a line where there are no results."""
    seeds = [] if (folder / 'results.json').is_file() else run_dir.seed_folders(folder)
    evaluated = [one for one in seeds or [folder] if (one / 'results.json').is_file()]
    for one in seeds or [folder]:
        if one not in evaluated:
            notes.append(f'{one} is left out: it has no results; run --stages=evaluate first')
    reports = tuple(map(collect.collect, evaluated))
    for one, report in zip(evaluated, reports):
        _check(one, report)
        same = (_key(report), report.stage, report.names[report.stage])
        first = reports[0]
        if same != (_key(first), first.stage, first.names[first.stage]):
            raise UserError(
                f'{folder}: {one.name} and {evaluated[0].name} are not the same model on the same '
                'data; compare them as runs of their own'
            )
    return reports


def _check(folder: Path, report: RunReport) -> None:
    """Refuses results without figures of the compared model, and ranks of other users."""
    try:
        for protocol in PROTOCOLS:
            report.metrics(report.stage, protocol)[f'ndcg@{K}']
        targets = collect.count_targets(report.card)
        PROTOCOLS.index(report.protocol)
        f'{targets:,} {report.card["dataset"]["users"]:,} {report.card["dataset"]["items"]:,}'
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{folder / "results.json"} is damaged; run --stages=evaluate again'
        ) from error
    for of_stage in report.ranks.values():
        for rank_R in of_stage.values():
            if len(rank_R) != targets:
                raise UserError(
                    f'{folder / "ranks.npz"} has ranks of {len(rank_R):,} targets and results.json '
                    f'has {targets:,}; run --stages=evaluate again'
                )


def _named(runs: Sequence[Run], sweeps: Sequence[Sweep], against: str) -> Run:
    path = Path(against).resolve()
    bests = {sweep.folder.resolve(): sweep.best.resolve() for sweep in sweeps}
    path = bests.get(path, path)
    found = [run for run in runs if run.name == against or run.folder.resolve() == path]
    if len(found) != 1:
        names = ', '.join(run.name for run in runs)
        raise UserError(f'--against={against} is none of the runs; give one of {names}')
    return found[0]


# Comparing.


def _section(title: str, runs: Sequence[Run], reference: Run) -> Section:
    notes = []
    for run in runs:
        if run.ranks(PROTOCOLS[0]) is None:
            notes.append(f'{run.name} has no ranks.npz: no intervals and no groups of its users')
        if not any(report.curves for report in run.reports):
            notes.append(f'{run.name} has no metrics.jsonl: no curve')
        if run.spread('lists', reference.first.protocol, 'coverage@10') is None:
            notes.append(f'{run.name} has no metrics of its lists: it is not in the scatter chart')
        notes += _limits(run)
    groupings = _group(runs, notes)
    return Section(
        title=title,
        runs=runs,
        reference=reference,
        tests={run.name: _tests(run, reference) for run in runs if run is not reference},
        baselines={name: _tests(reference, reference, name) for name in UNTRAINED},
        settings=differing_settings(runs),
        groupings=groupings,
        notes=notes,
    )


def split_name(card: Mapping[str, Any]) -> str:
    """The split of a protocol card in a few words."""
    by_time = card.get('time_split')
    return f'by time at {by_time["at"]}, {by_time["targets"]}' if by_time else 'leave one out'


def _splits(sections: Sequence[Section]) -> list[Splits]:
    """A table for all data whose runs of equal settings have several splits."""
    of_data: dict[tuple, list[Section]] = {}
    for section in sections:
        data, _, *same = _key(section.reference.first)
        of_data.setdefault((data, *same), []).append(section)
    found = []
    for some in of_data.values():
        rows: dict[tuple, list[Run | None]] = {}
        for place, section in enumerate(some):
            for run in section.runs:
                settings = _settings(run.first).items()
                same = (run.model, *((k, v) for k, v in settings if k not in OF_SPLIT))
                rows.setdefault(same, [None] * len(some))[place] = run
        trained = [
            Row(key[0], runs, next(filter(None, runs)).stage)
            for key, runs in rows.items()
            if len(runs) - runs.count(None) > 1
        ]
        if trained:
            found.append(Splits(some, trained + _untrained_rows(some)))
    return found


def _untrained_rows(sections: Sequence[Section]) -> list[Row]:
    """A row for each baseline that the results of all sections have."""
    references = [section.reference for section in sections]
    names = [name for name in UNTRAINED if all(name in one.untrained for one in sections)]
    return [Row(references[0].first.names[name], references, name) for name in names]


def _limits(run: Run) -> list[str]:
    """A line for each stage that ended at its limit of epochs, with the seeds where it did."""
    seeds: dict[str, list[str]] = {}
    for report in run.reports:
        for line in collect.limit_lines(report.card):
            seeds.setdefault(line, []).append(str(report.card.get('seed')))
    if len(run.reports) == 1:
        return [f'{run.name}: {line}' for line in seeds]
    return [f'{run.name}, seed {", ".join(of_line)}: {line}' for line, of_line in seeds.items()]


def _tests(run: Run, reference: Run, stage: str = '') -> dict[str, Test]:
    """The tests of a run, or of another row of its results, by protocol; {} without ranks."""
    tests = {}
    for protocol in PROTOCOLS:
        ranks = [run.ranks(protocol, stage), reference.ranks(protocol)]
        if any(rank_SU is None for rank_SU in ranks):
            continue
        first_SU, second_SU = (significance.ndcg(rank_SU, K) for rank_SU in ranks)
        interval = significance.paired_interval(first_SU.mean(0), second_SU.mean(0))
        shared = [seed for seed in run.seeds if seed in reference.seeds]
        places = [(run.seeds.index(seed), reference.seeds.index(seed)) for seed in shared]
        each = [float((first_SU[a] - second_SU[b]).mean()) for a, b in places]
        tests[protocol] = Test(interval, tuple(each) if len(each) > 1 else ())
    return tests


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The flags in which runs differ, and each run's value; pairs of a flag are rows of their own.

    Flags of the data are left out, since the data are the same, and so are flags that do not bind
    a run, and options that only one model has. '': the flag does not count for that model. A flag
    that an earlier version lacked has its default.
    """
    of_runs = [[_settings(report) for report in run.reports] for run in runs]
    models = [str(run.first.card.get('config', {}).get('model')) for run in runs]
    names = dict.fromkeys(name for seeds in of_runs for one in seeds for name in one)
    rows = []
    for name in names:
        default = FLAGS[name].default if name in FLAGS else None
        default = None if default is None else show(default)
        values = [_joined([one.get(name, default) for one in seeds]) for seeds in of_runs]
        known = {value for value in values if value is not None}
        if len(known) > 1 or len(set(zip(models, values))) > len(set(models)):
            rows.append((name, [value or '' for value in values]))
    return rows


def _joined(values: Sequence[str | None]) -> str | None:
    """The different values of the seeds of a run; None where the flag does not count."""
    known = dict.fromkeys(value for value in values if value is not None)
    return ', '.join(known) if known else None


def _settings(report: RunReport) -> dict[str, str | None]:
    """The flags and pairs of flags that bind a run, as texts; None: it does not count."""
    values: dict[str, str | None] = {}
    for name, value in report.card.get('config', {}).items():
        bound = binds(name) if name in FLAGS else 'unknown'
        if bound in ('', 'data'):
            continue
        value = tuple(map(str, value)) if isinstance(value, list) else value
        separator = FLAGS[name].metadata.get('separator') if name in FLAGS else None
        if value is None or (bound == 'finetune' and report.stage != 'finetune'):
            values[name] = None
        elif separator:
            pairs = [str(pair).partition(separator) for pair in value or ()]
            values |= {f'{name}={key}': text for key, _, text in pairs}
        else:
            values[name] = show(value)
    return values


def _group(runs: Sequence[Run], notes: list[str]) -> Sequence[Grouping]:
    """The groups of users of all runs with ranks; () and a line without the prepared data."""
    ranks = {
        run.name: {protocol: run.ranks(protocol) for protocol in PROTOCOLS}
        for run in runs
        if all(run.ranks(protocol) is not None for protocol in PROTOCOLS)
    }
    folder = find_data(runs)
    if folder is None:
        notes.append('no groups of users: the prepared data are in none of the runs’ folders')
    if folder is None or not ranks:
        return ()
    data, by_time = Dataset.load(folder), runs[0].first.card.get('time_split')
    if by_time:
        data = data.split_by_time(by_time['at'], by_time['targets'])
    return collect.group_users(data, ranks)


def _of_data(card: Mapping[str, Any]) -> str:
    """The fingerprint of the prepared data, which is the same in every split of them."""
    by_time = card.get('time_split')
    return by_time['data_sha256'] if by_time else card['dataset']['fingerprint']


def find_data(runs: Iterable[Run]) -> Path | None:
    """The folder of the prepared data: of a run, beside its seeds, or the one of --prepared."""
    for run in runs:
        fingerprint = _of_data(run.first.card)
        prepared = str(run.first.card.get('config', {}).get('prepared') or '')
        places = [run.folder, run.folder.resolve().parent, *([Path(prepared)] if prepared else [])]
        for place in places:
            path = place / 'dataset' / 'dataset.json'
            if path.is_file():
                card = run_dir.read_json(path)
                if isinstance(card, dict) and card.get('fingerprint') == fingerprint:
                    return path.parent
    return None
