"""The tables of many runs as a Markdown page, from the plain values of `tables.collect`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fame_jax.evaluation import lists, significance
from fame_jax.evaluation.metrics import PROTOCOLS
from fame_jax.report import published

METRICS = published.COLUMNS
SELECT_ON = 'ndcg@20'  # validation


def markdown(tables: Mapping[str, Any]) -> str:
    """The tables as a page."""
    splits = 'leave one out'
    if any('time_split' in table for table in tables['datasets'].values()):
        splits = 'leave one out except where a table is headed “split by time”'
    parts = [
        f'Test figures, {splits}, every user ranked against all items, ties count against the '
        'target; best epoch by validation NDCG@20, masked. Mean ± sample standard deviation over '
        'seeds. Bold: the best row by validation NDCG@20, masked. *Italics: printed by others, '
        'under the protocol that they state.*\n'
    ]
    for dataset, table in tables['datasets'].items():
        card, remarks = table['card'], {}
        parts.append(f'## {dataset}: {card["users"]:,} users, {card["items"]:,} items\n')
        if by_time := table.get('time_split'):
            parts.append(f'{_describe_split(by_time)}\n')
        if share := table.get('repeats', 0):
            parts.append(f'{share:.1%} of the test targets stand in the history of their user.\n')
        if table.get('select_on', 'masked') != 'masked':
            parts.append(
                f'Of this data set best epochs and the best row are by validation NDCG@20, '
                f'{table["select_on"]}.\n'
            )
        for protocol in PROTOCOLS:
            parts += [f'### {protocol.capitalize()}\n', *_table(table, protocol, remarks), '']
        parts += [f'[{number}] {remark}.\n' for remark, number in remarks.items()]
        parts += _tests_text(table['tests'])
        machines = dict.fromkeys(m for row in table['rows'] for m in row['machines'])
        parts += [f'Machine: {machine}.\n' for machine in machines]
        parts += [f'Note: {note}.\n' for note in table['notes']]
    return '\n'.join(parts)


def _describe_split(by_time: Mapping[str, Any]) -> str:
    """A split by time in two sentences."""
    test = by_time['test']
    text = (
        f'Training before {by_time["validation_moment"]}, test from {by_time["moment"]} on: '
        f'{test["targets"]:,} targets of {test["users"]:,} users. '
        f'{test["targets_without_training"]:,} targets and {test["users_without_training"]:,} '
        'users have no training action.'
    )
    if by_time['targets'] == 'successive':
        text += ' Intervals treat the targets of a user as independent.'
    return text


def _table(table: Mapping[str, Any], protocol: str, remarks: dict[str, int]) -> list[str]:
    """The lines of one table; remarks on published rows are numbered in order of appearance."""
    metrics = [metric.upper() for metric in METRICS]
    head = ['model', 'seeds', *metrics, f'validation {SELECT_ON.upper()}']
    # Columns of the rows that have them: NDCG@10 of the order test, and metrics of lists.
    more = [('shuffled', 'ndcg@10', 'shuffled NDCG@10')]
    more += [('lists', column, column) for column in lists.COLUMNS]
    more = [m for m in more if any(protocol in row.get(m[0], {}) for row in table['rows'])]
    head += [*(name for _, _, name in more), 'epochs', 'seconds', 'parameters']
    lines = [_line(head), '|---' * len(head) + '|']
    trained = [row for row in table['rows'] if row['seeds']]
    selected = table.get('select_on', 'masked')
    best = max(trained, key=lambda row: row['validation'][selected][SELECT_ON]['mean'])
    shown = set()
    for row in table['rows']:
        figures = [_figure(row['test'][protocol][metric]) for metric in METRICS]
        found = [row.get(part, {}).get(protocol, {}) for part, _, _ in more]
        extra = [_extra(of_part.get(name), name) for of_part, (_, name, _) in zip(found, more)]
        if row['seeds']:
            title = f'**{row["title"]}**' if row is best else row['title']
            epochs = ' to '.join(map(str, sorted({min(row['epochs']), max(row['epochs'])})))
            figures += [_figure(row['validation'][protocol][SELECT_ON]), *extra, epochs]
            figures += [f'{row["seconds"]["mean"]:,.0f}', f'{row["parameters"]:,}']
            lines.append(_line([title, str(len(row['seeds'])), *figures]))
        else:  # a model that is not trained
            lines.append(_line([row['title'], '', *figures, '', *extra, '', '', '']))
        if row['model'] not in shown:
            for other in table['published'][protocol].get(row['model'], []):
                cells = _published_cells(other, remarks)
                lines.append(_line([*cells, *[''] * (len(head) - len(cells))]))
        shown.add(row['model'])
    return lines


def _line(cells: Iterable[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _figure(spread: Mapping[str, Any]) -> str:
    sd = '' if spread['sd'] is None else f' ± {published.short(spread["sd"])}'
    return published.short(spread['mean']) + sd


def _extra(spread: Mapping[str, Any] | None, name: str) -> str:
    if spread is None:
        return ''
    return _figure(spread) if name not in lists.COLUMNS else lists.show(name, spread['mean'])


def _published_cells(other: Mapping[str, Any], remarks: dict[str, int]) -> list[str]:
    numbers = [remarks.setdefault(remark, len(remarks) + 1) for remark in other['remarks']]
    source = '; '.join(filter(None, (other['place'], other['protocol'], other['about'])))
    values = other['values']
    figures = [f'*{published.short(values[m])}*' if m in values else '' for m in METRICS]
    return [f'*{source}*' + ''.join(f' [{n}]' for n in numbers), '', *figures]


def _tests_text(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tests:
        return []
    first = tests[0]['first']
    head = ('', 'seeds', first, 'other', 'difference', '95 % interval', 'p')
    lines = [
        f'### {first} against the others\n',
        f'{tests[0]["users"]:,} users in pairs, the mean of each over the shared seeds; interval '
        f"by {significance.RESAMPLES:,} resamples of users, p of Wilcoxon's signed-rank test.\n",
        _line(head),
        '|---' * len(head) + '|',
    ]
    for test in tests:
        name = f'{test["second"]}, {test["protocol"]} {test["metric"].upper()}'
        means = [published.short(test[f'{which}_mean']) for which in ('first', 'second')]
        interval = f'{_signed(test["low"])} to {_signed(test["high"])}'
        p = '< .0001' if test['p'] < 1e-4 else published.short(test['p'])
        seeds = ', '.join(map(str, test['seeds']))
        lines.append(_line([name, seeds, *means, _signed(test['difference']), interval, p]))
    return [*lines, '']


def _signed(value: float) -> str:
    return f'{value:+.4f}'.replace('0.', '.', 1)
