"""One HTML file about a run, from plain facts: no network, no script, light and dark."""

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from fame_jax import insides
from fame_jax.letters import plain
from fame_jax.markup import figure, short, table, text

Facts = Mapping[str, Any]

COLUMNS = ('hr@5', 'hr@10', 'hr@20', 'ndcg@5', 'ndcg@10', 'ndcg@20', 'mrr')
PROTOCOLS = ('masked', 'unmasked')
# Styles inside the page and images inside the page; nothing from elsewhere, and no script.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STAGES = {'text': 'Text pre-training', 'pretrain': 'Pre-training', 'finetune': 'Fine-tuning'}


def page(facts: Facts) -> str:
    """The whole page; a section whose facts are not there is left out.

    Args:
      facts: as `report.collect` has them.
    """
    sections = [
        ('metrics', 'Test metrics', _metrics(facts)),
        ('curves', 'Learning curves', _curves(facts['curves'])),
        ('groups', 'For whom it works', _groups(facts)),
        ('heads', 'Gate and routers', insides.heads(facts['heads'])),
        ('facets', 'Heads and facets', insides.facets(facts)),
        ('cases', 'Cases', insides.cases(facts)),
        ('protocol', 'Protocol', _protocol(facts['card'])),
        ('again', 'The same again', _again(facts)),
    ]
    sections = [section for section in sections if section[2]]
    links = ''.join(f'<li><a href="#{name}">{title}</a></li>\n' for name, title, _ in sections)
    bodies = ''.join(
        f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>\n'
        for name, title, body in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n{_head(_title(facts))}<body>\n<header>\n'
        f'<h1>{text(_title(facts))}</h1>\n{_summary(facts)}\n'
        f'<nav aria-label="Sections"><ul>\n{links}</ul></nav>\n</header>\n'
        f'<main>\n{bodies}</main>\n</body>\n</html>\n'
    )


def _title(facts: Facts) -> str:
    return f'{facts["names"][facts["final"]]} on {facts["card"]["dataset"]["name"]}'


def _head(title: str) -> str:
    style = resources.files('fame_jax').joinpath('page.css').read_text(encoding='utf-8')
    return (
        '<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<title>{html.escape(plain(title, 120))}</title>\n<style>\n{style}</style>\n</head>\n'
    )


def _summary(facts: Facts) -> str:
    """The verdict in words."""
    data, final = facts['card']['dataset'], facts['final']
    found = {stage: of_stage['test'] for stage, of_stage in facts['results'].items()}
    masked, unmasked = (found[final][protocol] for protocol in PROTOCOLS)
    parts = [
        f'<b>{text(facts["names"][final])}</b> on <b>{text(data["name"])}</b>: the last item of '
        f'each of {data["users"]:,} users is to be found among all {data["items"]:,}. With the '
        f'history’s own items masked, HR@10 is <b>{short(masked["hr@10"])}</b> and NDCG@10 '
        f'<b>{short(masked["ndcg@10"])}</b>; unmasked, {short(unmasked["hr@10"])} and '
        f'{short(unmasked["ndcg@10"])}.'
    ]
    if 'popularity' in found:
        floor = found['popularity']['masked']
        told = f'Popularity has {short(floor["hr@10"])} and {short(floor["ndcg@10"])}, masked'
        if floor['ndcg@10']:
            told += f': NDCG@10 is {masked["ndcg@10"] / floor["ndcg@10"]:.3g} times that'
        parts.append(told + '.')
    if final == 'finetune' and 'pretrain' in found:
        told = ' and '.join(_gain(found['finetune'], found['pretrain'], p) for p in PROTOCOLS)
        name = text(facts['names']['pretrain'])
        parts.append(f'Over its backbone, {name}, fine-tuning takes NDCG@10 {told}.')
    return f'<p>{" ".join(parts)}</p>'


def _gain(found: Facts, backbone: Facts, protocol: str) -> str:
    value, before = found[protocol]['ndcg@10'], backbone[protocol]['ndcg@10']
    change = f' ({100 * (value / before - 1):+.1f} %)' if before else ''
    return f'from {short(before)} to {short(value)}{change} {protocol}'


def _metrics(facts: Facts) -> str:
    """A table a protocol: every stage, and what the paper printed below it."""
    parts, remarks = [], {}
    for protocol in PROTOCOLS:
        rows, kinds = [], []
        for stage, found in facts['results'].items():
            rows.append([text(found['model']), *_figures(found['test'][protocol])])
            kinds.append('main' if stage == facts['final'] else '')
            if stage in facts['paper']:
                name, values, told = facts['paper'][stage]
                marks = [remarks.setdefault(remark, len(remarks) + 1) for remark in told]
                name = f'{text(name)} in the paper' + ''.join(f' [{n}]' for n in marks)
                rows.append([name, *_figures(values)])
                kinds.append('printed')
        head = [protocol.capitalize(), *(column.upper() for column in COLUMNS)]
        parts.append(table(head, rows, kinds=kinds))
    told = ''.join(f' [{n}] {text(remark)}.' for remark, n in remarks.items())
    if facts['paper']:
        parts.append(
            '<p class="note">In italics: FAME’s Table 2 (arXiv 2411.01457). It does not tell '
            'whether items of the history were masked, so it stands in both tables, to be '
            f'compared by eye.{told}</p>'
        )
    return ''.join(parts)


def _figures(values: Facts) -> list[str]:
    return [short(values.get(column)) for column in COLUMNS]


def _curves(curves: Sequence[Facts]) -> str:
    """A panel a stage."""
    parts = [
        f'<div><h3>{STAGES.get(curve["stage"], text(curve["stage"]))}</h3>'
        + figure(curve['svg'], f'curve-{n}', f'{curve["stage"]}: {curve["about"]}')
        + '</div>'
        for n, curve in enumerate(curves)
    ]
    return f'<div class="panels">{"".join(parts)}</div>' if parts else ''


def _groups(facts: Facts) -> str:
    """A table and a figure for each way to part the users."""
    parts = []
    for n, group in enumerate(facts['groups']):
        others = [stage for stage in group['rows'][0]['figures'] if stage != facts['final']]
        head = [group['by'], 'users', 'HR@10', 'NDCG@10', 'unmasked']
        head += [f'{text(facts["names"][stage], 40)}: NDCG@10' for stage in others]
        rows = [_group(row, facts['final'], others) for row in group['rows']]
        drawn = figure(group['svg'], f'group-{n}', f'Masked NDCG@10 by {group["by"]}.')
        parts.append(f'<h3>By {group["by"]}</h3>{drawn}{table(head, rows)}')
    if parts:
        parts.append(
            '<p class="note">Test users, parted by quantiles into groups of about one size. '
            'Masked where not told otherwise; ± is the standard error over users.</p>'
        )
    return ''.join(parts)


def _group(row: Facts, final: str, others: Sequence[str]) -> list[str]:
    figures = row['figures']
    masked, unmasked = (figures[final][protocol] for protocol in PROTOCOLS)
    return [
        row['name'],
        f'{row["users"]:,}',
        short(masked['hr@10']),
        _with_error(masked),
        short(unmasked['ndcg@10']),
        *(_with_error(figures[stage]['masked']) for stage in others),
    ]


def _with_error(values: Facts) -> str:
    return f'{short(values["ndcg@10"])} ± {short(values["error"])}'


def _protocol(card: Facts) -> str:
    """The protocol card, one line a fact; the config is in flags.cfg."""
    told = {name: value for name, value in card.items() if name != 'config'}
    rows = [[text(name), text(value, 500)] for name, value in _flat(told)]
    return table(['', ''], rows, names=2)


def _flat(value: Any, name: str = '') -> list[tuple[str, Any]]:
    """Nested dicts as lines of 'outer, inner' and what stands there."""
    if not isinstance(value, Mapping):
        told = f'{value:,}' if isinstance(value, int) and 'seed' not in name else value
        return [(name, f'{value:,.1f}' if isinstance(value, float) else told)]
    return [
        line
        for key, inner in value.items()
        for line in _flat(inner, f'{name}, {key}' if name else str(key))
    ]


def _again(facts: Facts) -> str:
    """The command, and the flags it needs."""
    if not facts['flags']:
        return ''
    shown = (c if c.isprintable() or c == '\n' else '\ufffd' for c in facts['flags'])
    flags = html.escape(''.join(shown))
    command = 'python -m fame_jax.main --flagfile=flags.cfg --workdir=again'
    return (
        f'<p>Save the flags below as flags.cfg. With fame_jax {text(facts["code"])} they repeat '
        f'the run in the folder again:</p>\n<pre>{command}</pre>\n'
        f'<details><summary>flags.cfg</summary>\n<pre>{flags}</pre>\n</details>'
    )
