"""Several runs side by side: the record that `fame_jax compare` shows, from the runs' folders.

Only runs of equal data, split, candidates, ties and selecting protocol stand in one section; a
model that was trained in several splits of the same data stands in a table of splits too. A folder
of several seeds is one run. Intervals are paired over users; a user's NDCG is the mean over the
seeds of a run.
"""

from collections.abc import Sequence
from pathlib import Path

from fame_jax.config import FLAGS
from fame_jax.config.fields import show
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.evaluation import significance
from fame_jax.evaluation.metrics import PROTOCOLS
from fame_jax.report import collect
from fame_jax.report.collect import Grouping
from fame_jax.report.compared_runs import Key, find_data, key_of, read_runs, settings_of
from fame_jax.report.comparison_record import (
    UNTRAINED,
    Comparison,
    Row,
    Run,
    Section,
    Splits,
    Sweep,
    Test,
)
from fame_jax.report.tables import table_name

K = 10  # cut-off of the NDCG of the tests
OF_SPLIT = ('seed', 'split', 'split_at', 'split_targets')  # flags that a table of splits ignores


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
    runs, sweeps = read_runs([Path(folder) for folder in folders], notes)
    if not runs and not sweeps:
        raise UserError('; '.join(notes) or 'name the folders of the runs to compare')
    chosen = _named(runs, sweeps, against) if against else None
    sections: dict[Key, list[Run]] = {}
    for run in runs:
        sections.setdefault(key_of(run.first), []).append(run)
    first_key = next(iter(sections), None)
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
    return Comparison(found, sweeps, notes, _splits(found, notes))


def _difference(key: Key, first: Key) -> str:
    return ', '.join(name for name, a, b in zip(Key._fields, key, first) if a != b)


def _named(runs: Sequence[Run], sweeps: Sequence[Sweep], against: str) -> Run:
    path = Path(against).resolve()
    bests = {sweep.folder.resolve(): sweep.best.resolve() for sweep in sweeps}
    path = bests.get(path, path)
    found = [run for run in runs if run.name == against or run.folder.resolve() == path]
    if len(found) != 1:
        names = ', '.join(run.name for run in runs)
        raise UserError(f'--against={against} is none of the runs; give one of {names}')
    return found[0]


def _section(title: str, runs: Sequence[Run], reference: Run) -> Section:
    notes = []
    if reference.first.card.get('time_split', {}).get('targets') == 'successive':
        notes.append(
            'a user with several targets counts once for each; intervals treat the targets as '
            'independent, which makes them too narrow'
        )
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
    of_runs = [[settings_of(report) for report in run.reports] for run in runs]
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
    if data.card['fingerprint'] != runs[0].first.card['dataset']['fingerprint']:
        notes.append('no groups of users: the prepared data give another split now')
        return ()
    return collect.group_users(data, ranks)


def _splits(sections: Sequence[Section], notes: list[str]) -> list[Splits]:
    """A table for all data whose runs of equal settings have several splits.

    Of several runs with the same settings and split a table has the one with the most seeds; a
    line names the others.
    """
    of_data: dict[Key, list[Section]] = {}
    for section in sections:
        key = key_of(section.reference.first)
        of_data.setdefault(key._replace(split=''), []).append(section)
    found = []
    for some in of_data.values():
        rows: dict[tuple, list[Run | None]] = {}
        left_out: list[tuple[tuple, Run, Run]] = []
        for place, section in enumerate(some):
            for run in section.runs:
                settings = settings_of(run.first).items()
                same = (run.model, *((k, v) for k, v in settings if k not in OF_SPLIT))
                row = rows.setdefault(same, [None] * len(some))
                before = row[place]
                if before is None or len(run.reports) > len(before.reports):
                    row[place] = run
                if before is not None:
                    left_out.append((same, before if row[place] is run else run, row[place]))
        shown = {same: runs for same, runs in rows.items() if len(runs) - runs.count(None) > 1}
        notes += [
            f'{run.name} is not in the table of splits: {shows.name} has the same settings and '
            'split; several seeds are one run if their folder is named'
            for same, run, shows in left_out
            if same in shown
        ]
        models = [same[0] for same in shown]
        trained = []
        for (model, *_), runs in shown.items():
            members = list(filter(None, runs))
            names = ', '.join(run.name for run in members)
            title = f'{model}: {names}' if models.count(model) > 1 else model
            trained.append(Row(title, runs, members[0].stage))
        if trained:
            found.append(Splits(some, trained + _untrained_rows(some)))
    return found


def _untrained_rows(sections: Sequence[Section]) -> list[Row]:
    """A row for each baseline that the results of all sections have."""
    references = [section.reference for section in sections]
    names = [name for name in UNTRAINED if all(name in one.untrained for one in sections)]
    return [Row(references[0].first.names[name], references, name) for name in names]
