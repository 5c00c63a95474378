"""Table 2 as a page in Markdown, made of what the verdict holds and nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import published
from benchmarks.verdict import METRICS
from fame_jax import evaluate as judge


def markdown(table: Mapping[str, Any]) -> str:
    """The table to be read, made of its command and of datasets, as `verdict.collect` has them."""
    parts = [
        '# Table 2 under one protocol\n',
        f'    {table["command"]}\n',
        'Test, leave one out, every user against the whole catalogue, a tie counts against the '
        'target; the best epoch by validation NDCG@20, masked. Mean and sample standard deviation '
        'over so many seeds as the row says; one seed has none. Seconds are of training, means '
        'over seeds. *Rows in italics are what others printed, under the protocol they name.*\n',
    ]
    for dataset, found in table['datasets'].items():
        parts += _dataset_text(dataset, found)
    return '\n'.join(parts)


def _dataset_text(dataset: str, found: Mapping[str, Any]) -> list[str]:
    card, remarks = found['card'], {}
    parts = [f'## {dataset}: {card["users"]:,} users, {card["items"]:,} items\n']
    for protocol in judge.PROTOCOLS:
        parts += [f'### {protocol.capitalize()}\n', *_table(found, protocol, remarks), '']
    parts += [f'[{n}] {remark}.\n' for remark, n in remarks.items()]
    parts += _significance_text(found)
    parts += machine_text(found['rows'])
    if found['missing']:
        parts.append(f'Not done: {", ".join(found["missing"])}.\n')
    return parts


def _table(found: Mapping[str, Any], protocol: str, remarks: dict[str, int]) -> list[str]:
    """The lines of one table; its remarks are added to those that have a number."""
    head = ('model', 'seeds', *(m.upper() for m in METRICS), 'epochs', 'seconds', 'parameters')
    floor = (figure(found['popularity'][protocol][metric]) for metric in METRICS)
    lines = [line(head), '|---' * len(head) + '|', line(('popularity', '', *floor, '', '', ''))]
    for row in found['rows']:
        lines.append(line(_cells(row, protocol)))
        for other in found['published'][protocol][row['model']]:
            lines.append(line(_published_cells(other, remarks)))
    return lines


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f'| {" | ".join(cells)} |'


def _cells(row: Mapping[str, Any], protocol: str) -> list[str]:
    figures = (figure(**row['test'][protocol][metric]) for metric in METRICS)
    return [row['title'], str(len(row['seeds'])), *figures, *training_cells(row)]


def training_cells(row: Mapping[str, Any]) -> list[str]:
    """Epochs, seconds and parameters of a row."""
    seconds = f'{row["seconds"]["mean"]:,.0f}'
    if row['seconds_with_backbone']:
        seconds += f' ({row["seconds_with_backbone"]["mean"]:,.0f} with its backbone)'
    low, high = min(row['epochs']), max(row['epochs'])
    epochs = f'{low}' if low == high else f'{low} to {high}'
    return [epochs, seconds, f'{row["parameters"]:,}']


def figure(mean: float, sd: float | None = None, **_: Any) -> str:
    """A figure, with its deviation where there is one."""
    return published.short(mean) + ('' if sd is None else f' ± {published.short(sd)}')


def _published_cells(other: Mapping[str, Any], remarks: dict[str, int]) -> list[str]:
    numbers = [remarks.setdefault(remark, len(remarks) + 1) for remark in other['remarks']]
    told = '; '.join(filter(None, (other['place'], other['protocol'], other['about'])))
    values = other['values']
    figures = [f'*{published.short(values[m])}*' if m in values else '' for m in METRICS]
    return [f'*{told}*' + ''.join(f' [{n}]' for n in numbers), '', *figures, '', '', '']


def _significance_text(found: Mapping[str, Any]) -> list[str]:
    tests = found['significance']
    if tests is None:
        return []
    best = tests['best_other']
    title = next(row['title'] for row in found['rows'] if row['model'] == best)
    any_test = next(iter(tests['masked'].values()))[best]
    seeds = ', '.join(map(str, any_test['seeds']))
    lines = [
        f'### FAME against {title}\n',
        'Of the models that are not FAME it is the best by validation NDCG@20, masked. '
        f'{any_test["users"]:,} users, each with the mean of its NDCG over the seeds {seeds}; '
        f'users resampled {tests["resamples"]:,} times in pairs, seeds not; '
        "Wilcoxon's signed-rank test, two-sided.\n",
        line(('', 'FAME', title, 'difference', '95 % interval', 'p')),
        '|---' * 6 + '|',
    ]
    for protocol in judge.PROTOCOLS:
        for metric, of_model in tests[protocol].items():
            lines.append(line((f'{protocol} {metric.upper()}', *_test_cells(of_model[best]))))
    return [*lines, '']


def _test_cells(test: Mapping[str, Any]) -> list[str]:
    return [
        *(published.short(test[who]) for who in ('fame', 'other')),
        _signed(test['difference']),
        f'{_signed(test["low"])} to {_signed(test["high"])}',
        '< .0001' if test['p'] < 1e-4 else published.short(test['p']),
    ]


def _signed(value: float) -> str:
    return f'{value:+.4f}'.replace('0.', '.', 1)


def machine_text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence a machine: what it is, which models it trained, and when."""
    titles: dict[str, list[str]] = {}
    dates: dict[str, set[str]] = {}
    for row in rows:
        for machine in row['machines']:
            told = _describe(machine)
            if row['title'] not in titles.setdefault(told, []):
                titles[told].append(row['title'])
            dates.setdefault(told, set()).add(machine['date'])
    lines = []
    for told, models in titles.items():
        which = '' if len(titles) == 1 else f' of {", ".join(models)}'
        when = ' to '.join(sorted({min(dates[told]), max(dates[told])}))
        lines.append(f'Machine{which}: {told}; {when}.\n')
    jobs, load = (max(row[name] for row in rows) for name in ('jobs', 'load'))
    shared = (
        f'Seconds are of a machine that had up to {jobs} of these runs at a time, and a load of up '
        f'to {load:.1f} when one began: they say little of speed.\n'
    )
    return [*lines, *([shared] if jobs > 1 or load > 1 else [])]


def _describe(machine: Mapping[str, Any]) -> str:
    device = machine['device']
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    return (
        f'{device["count"]} x {device["kind"]}, {machine["cores"]} cores, {machine["system"]}; '
        f'fame_jax {machine["code"]}, {versions}'
    )
