"""The HTML page of a comparison, from the elements of html.py, and its tables for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fame_jax.evaluation import lists
from fame_jax.evaluation.metrics import PROTOCOLS
from fame_jax.report import figures, figures_of_runs, html
from fame_jax.report.collect import SELECTION, Curves, count_targets, limit_lines
from fame_jax.report.comparison_record import Comparison, Run, Section, Splits, Sweep, Test
from fame_jax.report.figures_of_runs import MOST
from fame_jax.report.html import chart, number, panels, table, text
from fame_jax.screen import grid, one_line, short

GENERATOR = 'fame_jax compare'
SHOWN = ('hr@10', 'ndcg@10', 'ndcg@20')  # metrics on the terminal
COLUMNS = ('ndcg@10', 'hr@10', 'ndcg@20', 'hr@20', 'mrr')
NAME = 40  # characters of a run's name on the terminal
COVERAGE = 'coverage@10'
SPLIT_METRICS = ('hr@10', 'ndcg@10')  # of a table of splits
CHANCE = (
    'Intervals are paired over users, by Student’s t, and each is of one comparison: of twenty '
    'models that are equally good, about one has an interval without 0 by chance. Another seed '
    'trains another model, which no interval over users covers; the deviation over seeds does.'
)


def page(comparison: Comparison) -> str:
    """The whole page."""
    sections: dict[str, tuple[str, str]] = {}
    several = len(comparison.sections) > 1
    for n, section in enumerate(comparison.sections):
        prefix = f'{text(section.title)}: ' if several else ''
        for name, (heading, body) in {
            'metrics': ('Test metrics', _metrics(section, n)),
            'curves': ('Validation by epoch', _curves(section, n)),
            'settings': ('Settings that differ', _settings(section)),
            'groups': ('Groups of users', _groups(section, n)),
            'coverage': ('Coverage and accuracy', _coverage(section, n)),
            'runs': ('The runs', _runs(section)),
        }.items():
            heading = heading[0].lower() + heading[1:] if prefix else heading
            sections[f'{name}-{n}'] = (prefix + heading, body)
    for n, splits in enumerate(comparison.splits):
        heading = f'{text(splits.sections[0].title)}: the same models in {len(splits.names)} splits'
        sections[f'splits-{n}'] = (heading, _splits(splits))
    for n, sweep in enumerate(comparison.sweeps):
        sections[f'sweep-{n}'] = (
            f'Sweep {text(sweep.folder)}',
            _sweep(sweep, n),
        )
    return html.document(_title(comparison), _summary(comparison), sections, GENERATOR)


def _title(comparison: Comparison) -> str:
    titles = ', '.join(section.title for section in comparison.sections)
    runs = sum(len(section.runs) for section in comparison.sections)
    if runs < 2 and comparison.sweeps:
        names = ', '.join(sweep.folder.resolve().name for sweep in comparison.sweeps)
        return f'Sweep {names}' + (f' on {titles}' if titles else '')
    return f'{runs} {"run" if runs == 1 else "runs"} on {titles}'


def _summary(comparison: Comparison) -> str:
    lines = [f'<p class="verdict">{_headline(one)}</p>' for one in comparison.sections]
    lines += [f'<p class="note">{text(note, 400)}.</p>' for note in comparison.notes]
    return '\n'.join(lines)


def _headline(section: Section) -> str:
    """The best run by validation, and its test figures against the reference."""
    protocol, best = section.protocol, section.best
    card = section.reference.first.card['dataset']
    words = [f'{text(section.title)}: {card["users"]:,} users, {card["items"]:,} items.']
    if 'time_split' in section.reference.first.card:
        words.append(f'{count_targets(section.reference.first.card):,} test targets.')
    if best is None:
        words.append('No best run: a run has no validation figures.')
        return ' '.join(words)
    value = best.spread('test', protocol, 'ndcg@10')
    validation = best.spread('validation', protocol, SELECTION)
    if len(section.runs) > 1:
        words.append(
            f'The best run by validation NDCG@20 ({protocol}) is <b>{text(best.name)}</b> '
            f'({_mean(validation)}).'
        )
    words.append(f'Its test NDCG@10 is <b>{_mean(value)}</b>')
    against, test = section.reference.name, section.tests.get(best.name, {}).get(protocol)
    if test:
        words[-1] += f', against {text(against)}: {html.describe_interval(test.interval)}'
        words[-1] += f'; {_seeds(test)} seeds are above 0' if test.each else ''
    elif best is section.reference and len(section.runs) > 1:
        words[-1] += '; it is the reference of the intervals'
    limited = [run.name for run in section.runs if any(map(limit_lines, _cards(run)))]
    words[-1] += '.'
    if limited:
        words.append(
            f'Ended at a limit of epochs and not by patience: {text(", ".join(limited), 300)}; '
            'more epochs may change the order.'
        )
    return ' '.join(words)


def _cards(run: Run) -> list[Mapping[str, Any]]:
    return [report.card for report in run.reports]


def _mean(spread: Mapping[str, Any] | None) -> str:
    """A mean, and its deviation over seeds where there is one; '' for None."""
    if spread is None:
        return ''
    sd = '' if spread['sd'] is None else f' ± {number(spread["sd"])}'
    return number(spread['mean']) + sd


def _seeds(test: Test) -> str:
    return f'{sum(value > 0 for value in test.each)} of {len(test.each)}'


def _cells(test: Test | None, *, percents: bool = True) -> list[str]:
    """A difference, its interval, in percent, and the seeds above 0."""
    if test is None:
        return [''] * (3 + percents)
    found = test.interval
    share = f'{100 * found.difference / found.second:+.1f} %' if found.second else ''
    interval = f'{short(found.low, "+")} to {short(found.high, "+")}'
    seeds = _seeds(test) if test.each else ''
    return [short(found.difference, '+'), interval, *([share] if percents else []), seeds]


# Sections of the page.


def _rows(section: Section) -> list[tuple[str, Run, str, Mapping[str, Test]]]:
    """The rows of a table of metrics: title, the run with the figures, their stage, the tests."""
    reference = section.reference
    rows = [(run.name, run, run.stage, section.tests.get(run.name, {})) for run in section.runs]
    return rows + [
        (reference.first.names[name], reference, name, section.baselines.get(name, {}))
        for name in section.untrained
    ]


def _metrics(section: Section, n: int) -> str:
    against, best = section.reference.name, section.best
    parts = []
    for protocol in sorted(PROTOCOLS, key=lambda protocol: protocol != section.protocol):
        rows, kinds = [], []
        for title, run, stage, tests in _rows(section):
            test = [_mean(run.spread('test', protocol, name, stage=stage)) for name in COLUMNS]
            validation = _mean(run.spread('validation', protocol, SELECTION, stage=stage))
            is_trained = stage == run.stage
            is_reference = is_trained and run is section.reference
            cells = ['', 'reference', '', ''] if is_reference else _cells(tests.get(protocol))
            rows.append([text(title, 60), test[0], *cells, *test[1:], validation])
            kinds.append(('main' if run is best else '') if is_trained else 'floor')
        head = ['', 'NDCG@10', 'difference', '95 % interval', 'in percent', 'seeds above 0']
        head += [*(column.upper() for column in COLUMNS[1:]), f'validation {SELECTION.upper()}']
        if not any(row[5] for row in rows):
            head, *rows = ([*row[:5], *row[6:]] for row in (head, *rows))
        parts.append(f'<h3>{protocol.capitalize()}</h3>')
        shown = {
            name: (test.interval.difference, test.interval.low, test.interval.high)
            for name, tests in section.tests.items()
            if (test := tests.get(protocol))
        }
        if shown:
            label = f'{protocol} NDCG@10 minus {one_line(against, 24)}'
            svg = figures.to_svg(figures_of_runs.intervals, shown, label)
            parts.append(chart(svg, f'interval-{n}-{protocol}', f'{label}, with 95 % intervals'))
        parts.append(table(head, rows, kinds=kinds))
    note = f'Difference: NDCG@10 of the row minus that of {text(against)}. {CHANCE} '
    note += 'Mean ± standard deviation over seeds. ' if _has_seeds(section) else ''
    note += 'Bold: the best run by validation. ' if best and len(section.runs) > 1 else ''
    return ''.join(parts) + f'<p class="note">{note}</p>'


def _has_seeds(section: Section) -> bool:
    return any(len(run.reports) > 1 for run in section.runs)


def _splits(splits: Splits) -> str:
    """A table for each protocol: a row for each model, its figures in each split."""
    parts = []
    for protocol in PROTOCOLS:
        kinds = [
            'floor' if row.stage in splits.sections[0].untrained else '' for row in splits.rows
        ]
        rows = [[text(row[0], 200), *row[1:]] for row in _split_rows(splits, protocol, _mean)]
        parts.append(f'<h3>{protocol.capitalize()}</h3>')
        parts.append(table(_split_head(splits, ''), rows, kinds=kinds))
    return ''.join(parts) + f'<p class="note">{_split_note(splits)}</p>'


def _split_head(splits: Splits, first: str) -> list[str]:
    return [first, *(f'{m.upper()}, {name}' for name in splits.names for m in SPLIT_METRICS)]


def _split_rows(
    splits: Splits, protocol: str, show: Callable[[Mapping[str, Any] | None], str]
) -> list[list[str]]:
    """The test figures of each model, as `show` writes a mean and its deviation over seeds."""
    return [
        [
            row.title,
            *(
                show(run.spread('test', protocol, metric, stage=row.stage) if run else None)
                for run in row.runs
                for metric in SPLIT_METRICS
            ),
        ]
        for row in splits.rows
    ]


def _split_note(splits: Splits) -> str:
    counts = ', '.join(f'{n:,} ({name})' for n, name in zip(splits.targets, splits.names))
    return (
        f'Test targets: {counts}. Only models with the same settings in several splits are shown. '
        'The figures of two splits are of other targets and have no paired test; in leave one out '
        'training contains actions of other users after a target, in a split by time it does not.'
    )


def _first(section: Section) -> tuple[Sequence[Run], str]:
    """The runs that charts show, and a note where that is not all."""
    number = len(section.runs)
    if number <= MOST:
        return section.runs, ''
    rest = [run for run in section.runs if run is not section.reference]
    shown = [section.reference, *rest[: MOST - 1]]
    return shown, f'<p class="note">{MOST} of the {number} runs are drawn: the first ones.</p>'


def _curves(section: Section, n: int) -> str:
    """A chart for each stage and each set of users that selects its epochs."""
    runs, note = _first(section)
    charts: dict[tuple[str, str], dict[str, list[Curves]]] = {}
    for run in runs:
        for report in run.reports:
            for curves in report.curves:
                key = curves.stage, str(report.card.get('selection', ''))
                charts.setdefault(key, {}).setdefault(run.name, []).append(curves)
    parts = []
    several = len({selection for _, selection in charts}) > 1
    for place, ((stage, selection), of_runs) in enumerate(charts.items()):
        lines, best, label = {}, {}, ''
        for name, of_seeds in of_runs.items():
            for curves in of_seeds:
                found = [key for key in curves.lines if key.startswith('validation')]
                if found:
                    label = found[0]
                    lines.setdefault(name, []).append(curves.lines[label])
                    best.setdefault(name, []).append(curves.best_epoch)
        if lines:
            svg = figures.to_svg(figures_of_runs.curves, lines, best, label)
            heading = f'<h3>{html.STAGES.get(stage, text(stage))}</h3>'
            heading += f'<p class="note">{text(selection, 300)}</p>' if several else ''
            of = f'{stage}: {label} by epoch of {", ".join(lines)}'
            parts.append(heading + chart(svg, f'curves-{n}-{place}', of))
    return panels(parts) + note if parts else ''


def _settings(section: Section) -> str:
    if len(section.runs) < 2:
        return ''
    if not section.settings:
        return '<p>No flag that binds a run differs.</p>'
    rows = [[text(f'--{name}'), *map(text, values)] for name, values in section.settings]
    head = ['', *(text(run.name, 60) for run in section.runs)]
    return table(head, rows, names=len(head)) + (
        '<p class="note">Flags of which the runs have different values; all others are equal, or '
        'do not bind a run. Empty: the flag does not count for that model.</p>'
    )


def _groups(section: Section, n: int) -> str:
    runs, note = _first(section)
    protocol = section.protocol
    parts = []
    for place, grouping in enumerate(section.groupings):
        found = grouping.rows[0]['figures']
        of_all = [run.name for run in section.runs if run.name in found]
        drawn = {run.name: run.name for run in runs if run.name in found}
        rows = []
        for row in grouping.rows:
            values = [row['figures'][name][protocol] for name in of_all]
            cells = [f'{number(one["ndcg@10"])} ± {number(one["error"])}' for one in values]
            rows.append([row['name'], f'{row["users"]:,}', *cells])
        svg = figures.to_svg(figures.groups, grouping.rows, drawn, protocol)
        label = f'{protocol} NDCG@10 by {grouping.by}'
        head = ['', 'users', *(text(name, 40) for name in of_all)]
        both = [chart(svg, f'group-{n}-{place}', label), table(head, rows)]
        parts.append(f'<h3>By {grouping.by}</h3>' + panels(both))
    if not parts:
        return ''
    return ''.join(parts) + (
        f'<p class="note">Test users, divided by quantiles into groups of similar size; {protocol} '
        'NDCG@10 with the standard error over users. Popularity of the target: its number of '
        f'actions in training.</p>{note}'
    )


def _coverage(section: Section, n: int) -> str:
    runs, note = _first(section)
    protocol = section.protocol
    points, rows = {}, []
    for run in section.runs:
        found = [run.spread('lists', protocol, name) for name in lists.COLUMNS]
        if None not in found:
            shown = zip(lists.COLUMNS, found)
            rows.append([text(run.name, 60), *(lists.show(c, of['mean']) for c, of in shown)])
            accuracy = run.spread('test', protocol, 'ndcg@10')
            points[run.name] = found[0]['values'], accuracy['values']
    if not points:
        return ''
    untrained = {}
    for name in section.untrained:
        x = section.reference.spread('lists', protocol, COVERAGE, stage=name)
        y = section.reference.spread('test', protocol, 'ndcg@10', stage=name)
        if x and y:
            untrained[section.reference.first.names[name]] = x['mean'], y['mean']
    drawn = {run.name: points[run.name] for run in runs if run.name in points}
    labels = 'coverage: share of the catalogue in a list of 10', f'test NDCG@10, {protocol}'
    svg = figures.to_svg(figures_of_runs.scatter, drawn, untrained, labels)
    drawing = chart(svg, f'coverage-{n}', 'NDCG@10 against coverage of the catalogue')
    return panels([drawing, table(['', *lists.COLUMNS], rows)]) + note


def _runs(section: Section) -> str:
    """Each run's model, training and place, and remarks."""
    rows = []
    for run in section.runs:
        stages = [report.card.get('stages', {}).get(run.stage, {}) for report in run.reports]
        rows.append(
            [
                text(run.name, 60),
                text(run.model, 200),
                _range(run.seeds),
                _range([one.get('parameters') for one in stages]),
                _range([one.get('best_epoch') for one in stages]),
                _range([one.get('epochs') for one in stages]),
                _range([one.get('seconds') for one in stages]),
                ', '.join(dict.fromkeys(map(_machine, stages))),
            ]
        )
    head = ['', 'model', 'seeds', 'parameters', 'best epoch', 'epochs', 'seconds', 'machine']
    notes = ''.join(f'<li>{text(note, 400)}</li>\n' for note in section.notes)
    card = section.reference.first.card
    return (
        table(head, rows, names=2)
        + (f'<ul class="note">\n{notes}</ul>' if notes else '')
        + f'<details><summary>Protocol of {text(section.reference.name)}, in words</summary>\n'
        f'{html.protocol_in_words(card)}</details>'
    )


def _range(values: Sequence[Any]) -> str:
    """Different values of the seeds: one, a few, or the smallest and the largest."""
    found = [value for value in values if isinstance(value, int | float)]
    if len(found) < len(values):
        return ''
    texts = list(dict.fromkeys(f'{value:,.0f}' for value in sorted(found)))
    return ', '.join(texts) if len(texts) <= 3 else f'{texts[0]} to {texts[-1]}'


def _machine(stage: Mapping[str, Any]) -> str:
    machine = stage.get('machine', {})
    device = machine.get('device', {}) if isinstance(machine, Mapping) else {}
    if not isinstance(device, Mapping) or not device:
        return ''
    code = f', fame_jax {machine["code"]}' if 'code' in machine else ''
    return text(f'{device.get("count", 1)} x {device.get("kind", "")}{code}', 100)


def _sweep(sweep: Sweep, n: int) -> str:
    svg = figures.to_svg(figures_of_runs.sweep_in_page, sweep.record)
    drawing = chart(svg, f'sweep-{n}', 'Validation of each setting, a panel for each flag')
    rows, kinds = [], []
    for setting, mean, deviation in sweep_rows(sweep):
        cell = number(mean) + (f' ± {number(deviation)}' if deviation else '')
        rows.append([text(setting, 200), cell])
        kinds.append('main' if setting == sweep.record['best'] else '')
    note = text(sweep.record.get('selected_by', ''), 300)
    head = ['setting', 'validation']
    return (
        panels([drawing, table(head, rows, kinds=kinds)])
        + f'<p class="note">The metric: {note}. A panel for each flag with several values: the '
        'line joins the settings that differ from the best one in this flag alone, faint dots are '
        'the others, the star is the best.</p>'
    )


def sweep_rows(sweep: Sweep) -> list[tuple[str, float, float]]:
    """Name, mean and deviation of the settings, best first."""
    _, means, deviations, _ = figures_of_runs.read_settings(sweep.record)
    names = [setting['name'] for setting in sweep.record['settings']]
    return sorted(zip(names, means, deviations), key=lambda row: -row[1])


# The terminal.


def terminal(comparison: Comparison) -> str:
    """The comparison as text: a block for each section and protocol, then flags and remarks."""
    parts = []
    for section in comparison.sections:
        card = section.reference.first.card['dataset']
        targets = count_targets(section.reference.first.card)
        by_time = 'time_split' in section.reference.first.card
        which = f'{targets:,} targets' if by_time else f'all {targets:,} users'
        parts.append(f'{section.title}, test: {which}, each against all {card["items"]:,} items')
        for protocol in PROTOCOLS:
            parts.append(_block(section, protocol))
        if section.settings:
            rows = [
                [f'--{one_line(name, NAME)}', *(one_line(value, 24) for value in values)]
                for name, values in section.settings
            ]
            head = ['flags that differ', *(one_line(run.name, NAME) for run in section.runs)]
            parts.append(grid(head, rows))
        parts += ['\n'.join(section.notes)] if section.notes else []
    for splits in comparison.splits:
        for protocol in PROTOCOLS:
            rows = [
                [one_line(row[0], NAME), *row[1:]] for row in _split_rows(splits, protocol, _plain)
            ]
            head = _split_head(splits, f'{protocol}, each split')
            parts.append(grid(head, rows, right=range(1, len(head))))
        parts.append(_split_note(splits))
    for sweep in comparison.sweeps:
        rows = [
            [one_line(name, 80), short(mean) + (f' ± {short(sd)}' if sd else '')]
            for name, mean, sd in sweep_rows(sweep)
        ]
        parts.append(grid([f'sweep {sweep.folder}', 'validation'], rows, right=(1,)))
    return '\n\n'.join([*parts, *comparison.notes])


def _block(section: Section, protocol: str) -> str:
    """The metrics of one protocol, and the differences to the reference."""
    rows = []
    for title, run, stage, tests in _rows(section):
        is_reference = stage == run.stage and run is section.reference
        test = _cells(tests.get(protocol), percents=False)
        found = [run.spread('test', protocol, name, stage=stage) for name in SHOWN]
        cells = ['reference', '', ''] if is_reference else test
        rows.append([one_line(title, NAME), *map(_plain, found), *cells])
    head = [protocol, *(name.upper() for name in SHOWN), 'NDCG@10 minus', '95 % over users']
    head.append('seeds above 0')
    head[4] += f' {one_line(section.reference.name, 20)}'
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return grid(head, rows, right=range(1, len(head)))


def _plain(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ''
    return short(spread['mean']) + ('' if spread['sd'] is None else f' ± {short(spread["sd"])}')
