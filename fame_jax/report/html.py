"""One HTML file about a run: no network, no script, readable on a phone, light and dark.

A cell, a caption or a heading is finished HTML; `text` escapes whatever comes from data.
"""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from fame_jax.data.card import REPEATS_SAID
from fame_jax.evaluation import lists, significance
from fame_jax.report import figures
from fame_jax.report.collect import PROTOCOLS, TRAINED, Case, Grouping, RunReport, limit_lines
from fame_jax.screen import one_line

Entry = Mapping[str, Any]

COLUMNS = ('hr@5', 'hr@10', 'hr@20', 'ndcg@5', 'ndcg@10', 'ndcg@20', 'mrr')
STAGES = {'text': 'Text pre-training', 'pretrain': 'Pre-training', 'finetune': 'Fine-tuning'}
RANKED = {'masked': 'With the items of the history masked', 'unmasked': 'With no item masked'}
HISTORY_ROWS = 20  # of a case: the latest items of the history
# Styles and images inside the file only, and no script.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(run: RunReport) -> str:
    """The whole page; sections without content are left out."""
    sections = {
        'metrics': ('Test metrics', _metrics(run)),
        'curves': ('Training', _curves(run)),
        'groups': ('Groups of users', _groups(run)),
        'heads': ('Heads and experts', _heads(run.heads) if run.heads else ''),
        'facets': ('Heads and facets', _facets(run)),
        'cases': ('Example users', _cases(run)),
        'protocol': ('Protocol', _protocol(run.card)),
        'flags': ('Reproduce this run', _flags(run)),
    }
    title = f'{run.names[run.stage]} on {run.card["dataset"]["name"]}'
    return document(title, _summary(run), sections)


def document(
    title: str, summary: str, sections: Mapping[str, tuple[str, str]], generator: str = ''
) -> str:
    """The HTML of a page.

    Args:
      title: plain text.
      summary: HTML below the title.
      sections: id -> (heading, HTML); those without HTML are left out.
      generator: the name of the command that makes the page.
    """
    sections = {name: section for name, section in sections.items() if section[1]}
    links = ''.join(f'<li><a href="#{name}">{h2}</a></li>\n' for name, (h2, _) in sections.items())
    bodies = ''.join(
        f'<section id="{name}">\n<h2>{h2}</h2>\n{body}\n</section>\n'
        for name, (h2, body) in sections.items()
    )
    style = resources.files('fame_jax.report').joinpath('page.css').read_text(encoding='utf-8')
    made_by = f'<meta name="generator" content="{generator}">\n' if generator else ''
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{made_by}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<title>{html.escape(one_line(title, 120))}</title>\n<style>\n{style}</style>\n</head>\n'
        f'<body>\n<header>\n<h1>{text(title)}</h1>\n{summary}\n'
        f'<nav aria-label="Sections"><ul>\n{links}</ul></nav>\n</header>\n'
        f'<main>\n{bodies}</main>\n</body>\n</html>\n'
    )


# Sections.


def _summary(run: RunReport) -> str:
    """The main result with its interval, the end of each stage, and the figures in sentences."""
    data, protocol = run.card['dataset'], run.protocol
    first, other = (run.metrics(run.stage, p) for p in (protocol, run.other_protocol))
    parts = [
        f'{_targets(run.card)} is ranked among all {data["items"]:,} '
        f'items. {RANKED[protocol]}, HR@10 is <b>{number(first["hr@10"])}</b> '
        f'and NDCG@10 <b>{number(first["ndcg@10"])}</b>; {run.other_protocol}, '
        f'{number(other["hr@10"])} and {number(other["ndcg@10"])}.'
    ]
    for name, title in (('popularity', 'Popularity'), ('item_graph', 'Item graph')):
        if name in run.results:
            floor = run.metrics(name, protocol)
            parts.append(
                f'{title}: HR@10 {number(floor["hr@10"])}, NDCG@10 {number(floor["ndcg@10"])} '
                f'({protocol}).'
            )
    parts.append(_repeats(run.card))
    if run.card.get('time_split', {}).get('targets') == 'successive':
        parts.append('In all sections, a user with several targets counts once for each.')
    lines = [_gain_line(run), *map(_capitalized, limit_lines(run.card))]
    return (
        f'<p>{" ".join(filter(None, parts))}</p>\n'
        + ''.join(f'<p class="verdict">{line}</p>\n' for line in lines if line).strip()
    )


def _targets(card: Mapping[str, Any]) -> str:
    """The targets of the test, as the subject of a sentence."""
    by_time = card.get('time_split')
    if not by_time:
        return f'The last item of each of {card["dataset"]["users"]:,} users'
    test = by_time['test']
    which = 'The last item' if by_time['targets'] == 'last' else 'Each item'
    return (
        f'The split is by time at {by_time["moment"]}, and training ends at '
        f'{by_time["validation_moment"]}. {which} from then on of {test["users"]:,} users '
        f'({test["targets"]:,} targets, {test["targets_without_training"]:,} of them without a '
        'training action)'
    )


def _capitalized(line: str) -> str:
    return line[0].upper() + line[1:]


def _gain_line(run: RunReport) -> str:
    """The gain of fine-tuning, or of a model without it over the baseline that is not trained."""
    after = run.metrics(run.stage, run.protocol)['ndcg@10']
    if run.stage == 'finetune' and 'pretrain' in run.results:
        before = run.metrics('pretrain', run.protocol)['ndcg@10']
        return (
            f'Fine-tuning changes {run.protocol} NDCG@10 from {number(before)} (the backbone, '
            f'{text(run.names["pretrain"])}) to {number(after)}{_gain(run, "pretrain")}.'
        )
    floor = next((name for name in ('item_graph', 'popularity') if name in run.results), '')
    if not floor or not (gain := _gain(run, floor)):
        return ''
    before = run.metrics(floor, run.protocol)['ndcg@10']
    return (
        f'{run.protocol.capitalize()} NDCG@10 is {number(after)}, and {number(before)} of '
        f'{text(run.names[floor])}, which is not trained{gain}.'
    )


def _gain(run: RunReport, before: str) -> str:
    """The gain over another row with its interval; '' without the ranks of the users."""
    if not {before, run.stage} <= {*run.ranks}:
        return ''
    pair = (significance.ndcg(run.ranks[stage][run.protocol], 10) for stage in (run.stage, before))
    return f' ({describe_interval(significance.paired_interval(*pair))})'


def describe_interval(test: significance.PairedInterval) -> str:
    """A difference in words: with its interval, in percent, and whether it can be chance."""
    words = str(test)
    if test.second:
        shares = (100 * value / test.second for value in (test.difference, test.low, test.high))
        words += '; {:+.1f} %, interval {:+.1f} % to {:+.1f} %'.format(*shares)
    if test.low <= 0 <= test.high:
        words += '; a difference of this size can be chance'
    return words


def _repeats(card: Mapping[str, Any]) -> str:
    """A sentence where many targets stand in their history; else ''."""
    share = card.get('repeats', {}).get('test', 0)
    if share <= REPEATS_SAID:
        return ''
    return (
        f'{percent(share)} of the targets stand in the history of their user: the masked ranking '
        f'has them last. The best epoch was selected by the {card["select_on"]} ranking.'
    )


def _metrics(run: RunReport) -> str:
    """Every stage under both protocols, and the paper's results in the row below its model."""
    rows, kinds, remarks = [], [], {}
    orders = [stage for stage in run.names if 'shuffled' in run.results[stage]]
    for protocol in PROTOCOLS:
        rows.append([protocol.capitalize(), *(column.upper() for column in COLUMNS)])
        rows[-1] += ['NDCG@10 shuffled'] if orders else []
        kinds.append('head')
        for stage, name in run.names.items():
            rows.append([text(name), *_values(run.metrics(stage, protocol))])
            if orders:
                of_order = run.results[stage].get('shuffled', {}).get(protocol, {})
                rows[-1].append(number(of_order.get('ndcg@10')))
            kinds.append('main' if stage == run.stage else '')
            if paper := run.paper.get(stage):
                marks = [remarks.setdefault(r, len(remarks) + 1) for r in paper.remarks]
                name = f'{text(paper.model)} in the paper' + ''.join(f' [{n}]' for n in marks)
                rows.append([name, *_values(paper.metrics), *([''] if orders else [])])
                kinds.append('paper')
    note = (
        '<p class="note">In italics: Table 2 of FAME (arXiv 2411.01457). It does not say whether '
        'items of the history were masked, and is therefore listed under both protocols.'
        + ''.join(f' [{n}] {text(remark)}.' for remark, n in remarks.items())
        + '</p>'
    )
    order = (
        '<p class="note">Shuffled: the same targets after histories whose items, but for the last, '
        'are in random order. The loss is the use that the model makes of the order.</p>'
    )
    return (
        table([], rows, kinds=kinds)
        + (note if run.paper else '')
        + (order if orders else '')
        + _lists(run)
    )


def _lists(run: RunReport) -> str:
    """Metrics of the recommended lists of every stage."""
    rows, protocols = [], {}
    for stage, name in run.names.items():
        for protocol, found in run.results[stage].get('lists', {}).items():
            protocols[protocol] = None
            values = (lists.show(c, found[c]) if c in found else '' for c in lists.COLUMNS)
            rows.append([text(name), *values])
    if not rows:
        return ''
    head = ['', *lists.COLUMNS]
    return (
        '<h3>Beyond accuracy</h3>'
        + table(head, rows)
        + f'<p class="note">Lists of {lists.K} items for all test users, {", ".join(protocols)}. '
        'Coverage: share of the catalogue that is in a list. Gini: 0 if all items are recommended '
        'equally often, near 1 if few are. Novelty: mean of −log2 of the share of users with an '
        'action on the item, in bits. ARP: mean number of training actions of a recommended item. '
        'Popular: share of recommended items among the fifth of the catalogue with the most '
        'training actions.</p>'
    )


def _values(metrics: Mapping[str, float]) -> list[str]:
    return [number(metrics.get(column)) for column in COLUMNS]


def _curves(run: RunReport) -> str:
    parts = []
    for n, curves in enumerate(run.curves):
        label = f'{curves.stage}: {", ".join(curves.lines)} by epoch'
        svg = figures.to_svg(figures.curves, curves.lines, curves.best_epoch)
        heading = f'<h3>{STAGES.get(curves.stage, text(curves.stage))}</h3>'
        parts.append(heading + chart(svg, f'curve-{n}', label))
    return panels(parts)


def _groups(run: RunReport) -> str:
    if not run.groupings:
        return ''
    return ''.join(_group(run, n, grouping) for n, grouping in enumerate(run.groupings)) + (
        '<p class="note">Test users, divided by quantiles into groups of similar size. Popularity '
        'of the target: its number of actions in training. HR@10 and NDCG@10 are masked, with the '
        'standard error over users; the columns on the right are NDCG@10 unmasked, and NDCG@10 of '
        'the other models.</p>'
    )


def _group(run: RunReport, n: int, grouping: Grouping) -> str:
    names = {stage: name for stage, name in run.names.items() if stage in TRAINED}
    others = [stage for stage in run.names if stage != run.stage]
    head = ['', 'users', 'HR@10', 'NDCG@10', 'unmasked', *(text(run.names[s], 40) for s in others)]
    rows = []
    for row in grouping.rows:
        masked, unmasked = (row['figures'][run.stage][protocol] for protocol in PROTOCOLS)
        ndcg = f'{number(masked["ndcg@10"])} ± {number(masked["error"])}'
        cells = [row['name'], f'{row["users"]:,}', number(masked['hr@10']), ndcg]
        cells.append(number(unmasked['ndcg@10']))
        cells += [number(row['figures'][stage]['masked']['ndcg@10']) for stage in others]
        rows.append(cells)
    svg = figures.to_svg(figures.groups, grouping.rows, names, 'masked')
    drawn = chart(svg, f'group-{n}', f'Masked NDCG@10 by {grouping.by}')
    return f'<h3>By {grouping.by}</h3>' + panels([drawn, table(head, rows)])


def _heads(use: Mapping[str, Any]) -> str:
    """Use of each head and expert in the sample of users."""
    heads = use['heads']
    experts = len(heads[0]['experts'])
    names = [_head_name(h, head) for h, head in enumerate(heads)]
    unused = [names[h] for h in use['dead_heads']]
    unused += [f'expert {n + 1} of {names[h]}' for h, n in use['dead_experts']]
    rows = [
        [
            name,
            percent(head['share']),
            percent(head['top']),
            _entropy(head['entropy']),
            _entropy(head['entropy_of_mean']),
        ]
        for name, head in zip(names, heads)
    ]
    rows.append(['gate', '', '', _entropy(use['entropy']), _entropy(use['entropy_of_mean'])])
    head = ['', 'mean weight', 'largest for', 'entropy', 'entropy of mean']
    tables = [table(head, rows, caption='The gate over heads, and the router of each head')]
    for key, caption in (
        ('share', "Router's mean weight of each expert"),
        ('top', 'Users for whom the expert weighs most'),
    ):
        most = max(expert[key] for head in heads for expert in head['experts'])
        rows = [
            [name, *(heat(expert[key], most) for expert in head['experts'])]
            for name, head in zip(names, heads)
        ]
        head = ['', *(str(n + 1) for n in range(experts))]
        tables += [table(head, rows, caption=caption)] if experts > 1 else []
    svg = figures.to_svg(figures.gates, heads, use['edges'])
    return (
        f'<p class="verdict">{len(heads)} heads with {experts} experts each. Unused: '
        f'{", ".join(unused) or "none"}.</p>'
        + panels([chart(svg, 'gates', "Gate's weight of each head over users"), ''.join(tables)])
        + f'<p class="note">{use["users"]:,} test users, sampled with the seed of the run, at the '
        'last item of their history. Unused: mean weight below a tenth of an equal share. Entropy '
        'is relative to its maximum: 1 is an even mix, 0 a single choice; “entropy” is the mean '
        'over users, “entropy of mean” belongs to the mean weights over all users.</p>'
    )


def _head_name(index: int, head: Mapping[str, Any]) -> str:
    return html.escape(figures.head_name(index, head))


def _entropy(value: float | None) -> str:
    return '' if value is None else f'{value:.3f}'


def _facets(run: RunReport) -> str:
    parts = []
    if run.facets:
        svg = figures.to_svg(figures.heads_by_facets, run.facets)
        parts.append(image(svg, 'Agreement of each head with each facet, 0 chance, 1 perfect'))
    if run.item_map:
        parts.append('<h3>Map of the items</h3>')
        parts.append(image(run.item_map, 'Items in the plane, coloured by label'))
    return ''.join(parts)


def _cases(run: RunReport) -> str:
    """Single users: the recommended items, each head's list, and the history."""
    if not run.cases:
        return ''
    note = (
        '<p class="note">Test users, selected from the sample by the rule in the heading. The '
        'next item of the user, the target of the test, is <mark>marked</mark>. '
        f'{"Items by title" if run.has_titles else "Items by id (no titles are known)"}. '
        '“No. 1 without it”: change of the first item’s score when the item is removed from the '
        f'history{"; attention: of all experts, weighted by router and gate" * bool(run.heads)}. '
        'Histories begin with the latest item.'
        '</p>'
    )
    return note + ''.join(_case(n, case) for n, case in enumerate(run.cases, 1))


def _case(n: int, case: Case) -> str:
    explained, target = case.explanation, case.explanation['target']
    line = f'User {text(case.user, 60)}.'
    if target:
        rank = f'rank {target["rank"]:,}' if target['rank'] else 'excluded, since already seen'
        line += f' Next item: <mark>{title(target)}</mark>, {rank}.'
    heading = f'<h3>{n}. {case.rule[0].upper()}{case.rule[1:]}</h3><p>{line}</p>'
    return heading + panels([_case_lists(explained), _history(explained)])


def _case_lists(explained: Mapping[str, Any]) -> str:
    """The model's list, each head's own, and that of equal gate weights, side by side."""
    columns = {'recommended': explained['recommended']}
    for h, head in enumerate(explained.get('heads', ())):
        columns[f'{_head_name(h, head)}: {percent(head["share"])}'] = head['top']
    if 'equal_gates' in explained:
        columns['equal weights'] = explained['equal_gates']
    target = (explained['target'] or {}).get('item')
    rows = [
        [str(place), *(_marked(entry, target) for entry in entries)]
        for place, entries in enumerate(zip(*columns.values()), 1)
    ]
    return table(['', *columns], rows, names=1 + len(columns))


def _marked(entry: Entry, target: str | None) -> str:
    return f'<mark>{title(entry)}</mark>' if entry['item'] == target else title(entry)


def _history(explained: Mapping[str, Any]) -> str:
    """The history, latest item first: attention, and the first item's score without it."""
    columns = {'history': [title(item) for item in explained['history']]}
    if 'heads' in explained:
        shares = {'attention': explained['carried']}
        for h, head in enumerate(explained['heads']):
            shares[_head_name(h, head)] = np.array(head['router']) @ np.array(head['attention'])
        columns |= {
            name: [heat(share, max(share_L)) for share in share_L]
            for name, share_L in shares.items()
        }
    if explained['recommended'] and (change_L := explained['recommended'][0]['without']):
        columns['no. 1 without it'] = [f'{change:+.2f}' for change in change_L]
    rows = list(zip(*columns.values()))[::-1]
    hidden = max(len(rows) - HISTORY_ROWS, 0) + explained['too_old']
    note = f'<p class="note">{hidden:,} earlier items are not shown.</p>' if hidden else ''
    return table(list(columns), rows[:HISTORY_ROWS]) + note


def _protocol(card: Mapping[str, Any]) -> str:
    """The protocol card, folded: in words, then one fact per row; the flags are elsewhere."""
    facts = {name: value for name, value in card.items() if name != 'config'}
    rows = [[text(name), text(value, 500)] for name, value in _flat(facts)]
    return (
        f'<details><summary>Protocol card, in words and all facts</summary>\n'
        f'{protocol_in_words(card)}\n{table([], rows, names=2)}</details>'
    )


def protocol_in_words(card: Mapping[str, Any]) -> str:
    """The protocol card in sentences; facts that it lacks are left out."""
    data = card['dataset']
    words = [f'Data set {text(data["name"])}: {data["users"]:,} users and {data["items"]:,} items.']
    for name, form in (
        ('split', 'The split is {}.'),
        ('candidates', 'Each target is ranked among {}.'),
        ('masked', 'Masked: {}.'),
        ('unmasked', 'Unmasked: {}.'),
        ('ties', 'Ties {}.'),
        ('selection', 'Selection: {}; the test split selects nothing.'),
        ('lists', 'Recommended lists: {}.'),
        ('seed', 'The seed is {}.'),
    ):
        if name in card:
            words.append(form.format(text(card[name], 500)))
    if 'test' in card.get('repeats', {}):
        share = percent(card['repeats']['test'])
        words.append(f'Of the test targets {share} stand in the history of their user.')
    return f'<p>{" ".join(words)}</p>'


def _flat(value: Any, name: str = '') -> list[tuple[str, str]]:
    """Nested mappings as lines ('outer, inner', value)."""
    if isinstance(value, Mapping):
        prefix = f'{name}, ' if name else ''
        return [line for key, inner in value.items() for line in _flat(inner, f'{prefix}{key}')]
    if isinstance(value, float):
        return [(name, f'{value:,.1f}' if abs(value) >= 100 else f'{value:.4g}')]
    grouped = type(value) is int and 'seed' not in name
    return [(name, f'{value:,}' if grouped else str(value))]


def _flags(run: RunReport) -> str:
    """The command that repeats the run, and its flag file, folded."""
    if not run.flags:
        return ''
    printable = (c if c.isprintable() or c == '\n' else '\ufffd' for c in run.flags)
    return (
        f'<p>Save the flags as flags.cfg. With fame_jax {text(run.version)}:</p>\n'
        '<pre>python -m fame_jax.main --flagfile=flags.cfg --workdir=again</pre>\n'
        f'<details><summary>flags.cfg</summary>\n<pre>{html.escape("".join(printable))}</pre>\n'
        '</details>'
    )


# Elements.


def text(value: Any, most: int = 200) -> str:
    """Anything as one line of escaped text, isolated in its own direction of writing."""
    return f'<bdi>{html.escape(one_line(value, most))}</bdi>'


def title(entry: Entry) -> str:
    """An item's title, or its id if it has none."""
    return text(entry['title'] or entry['item'], 120)


def number(value: float | None) -> str:
    """Four decimals without the leading 0; empty for None."""
    return '' if value is None else f'{value:.4f}'.replace('0.', '.', 1)


def percent(share: float) -> str:
    """0.123 as '12 %', with one decimal below 10 %."""
    return f'{100 * share:.{0 if share >= 0.0995 or not share else 1}f} %'


def panels(parts: Iterable[str]) -> str:
    """Parts side by side where there is room, else below each other."""
    inner = ''.join(f'<div>{part}</div>\n' for part in parts if part)
    return f'<div class="panels">{inner}</div>' if inner else ''


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    names: int = 1,
    kinds: Sequence[str] = (),
    caption: str = '',
) -> str:
    """A table that scrolls sideways within itself.

    Cells have no <td>, except those of `heat`. The first `names` columns hold words, the others
    numbers; `kinds` are CSS classes of the rows.
    """
    rows = list(rows)
    lines = [
        f'<tr class="{kind}">{_cells("td", row, names)}</tr>\n'
        for kind, row in zip(kinds or [''] * len(rows), rows)
    ]
    caption = f'<caption>{caption}</caption>' if caption else ''
    head = f'<thead><tr>{_cells("th", head, names)}</tr></thead>\n' if head else ''
    return (
        f'<div class="wide" tabindex="0"><table>{caption}\n{head}'
        f'<tbody>\n{"".join(lines)}</tbody></table></div>'
    )


def _cells(tag: str, row: Sequence[str], names: int) -> str:
    return ''.join(
        cell
        if cell.startswith('<td')
        else f'<{tag} class="{"name" if n < names else "number"}">{cell}</{tag}>'
        for n, cell in enumerate(row)
    )


def heat(share: float, most: float) -> str:
    """A cell with a share, shaded in proportion to the largest one."""
    shade = 0.6 * min(max(share / most, 0), 1) if most else 0
    style = f'background:rgba(0,114,178,{shade:.2f})'
    return f'<td class="number" style="{style}">{percent(share)}</td>'


def chart(svg: str, name: str, label: str) -> str:
    """One of our SVGs inside the page, so that it takes the colour of the text.

    Args:
      svg: a whole SVG file.
      name: prefix of its ids, so that they are unique in the page.
      label: description for screen readers.
    """
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg') :], flags=re.DOTALL)
    ids = re.compile(r'( id="|url\(#|href="#)')
    svg = re.sub('<[^>]*>', lambda tag: ids.sub(rf'\g<1>{name}-', tag[0]), svg)
    label = html.escape(one_line(label, 300))
    return f'<figure><svg role="img" aria-label="{label}"{svg.removeprefix("<svg")}</figure>'


def image(svg: str, label: str) -> str:
    """An SVG file as an image on a light card, without access to the page."""
    data = base64.b64encode(svg.encode('utf-8', 'replace')).decode()
    alt = html.escape(one_line(label, 300))
    source = f'data:image/svg+xml;base64,{data}'
    return f'<figure class="light"><img alt="{alt}" src="{source}"></figure>'
