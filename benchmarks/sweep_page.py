"""A sweep over heads and experts, to be read and to be seen, made of what sweep.json holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import verdict
from benchmarks.table_page import figure, line, machine_text, training_cells
from benchmarks.table_picture import legend_below
from fame_jax import evaluate as judge
from fame_jax import plots

METRICS = ('ndcg@20', 'hr@20')  # what the paper's Figures 5 and 6 show
SPLITS = ('test', 'validation')
SASREC, PLAIN, FAME = 'SASRec', 'FAME without MoE', 'FAME'
FIGURES = ('Figure 5: heads', 'Figure 6: experts')
STYLES = dict(zip((SASREC, FAME, PLAIN), plots.MARKS))

Points = list[Mapping[str, Any]]


def over_heads(sweep: Mapping[str, Any]) -> dict[str, Points]:
    """Figure 5: the points of each line, by heads."""
    asked = [p for p in sweep['points'] if p['heads'] in sweep['heads']]
    return {
        SASREC: [p for p in asked if p['model'] == 'sasrec'],
        PLAIN: [p for p in asked if p['experts'] == 1],
    }


def over_experts(sweep: Mapping[str, Any]) -> dict[str, Points]:
    """Figure 6: the points of its line, by experts."""
    asked = [p for p in sweep['points'] if p['experts'] in sweep['experts']]
    return {FAME: [p for p in asked if p['heads'] == sweep['at_heads']]}


def references(sweep: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What Figure 6 is held against: the other models with the same heads."""
    of = {SASREC: None, PLAIN: 1}
    here = {p['experts']: p for p in sweep['points'] if p['heads'] == sweep['at_heads']}
    return {name: here[experts] for name, experts in of.items() if experts in here}


def best(points: Points) -> Mapping[str, Any] | None:
    """The point of most validation NDCG@20, masked; None of none."""
    return max(points, key=verdict.chosen_by, default=None)


def markdown(sweep: Mapping[str, Any]) -> str:
    """The page."""
    card, at = sweep['card'], sweep['at_heads']
    lines5, lines6 = over_heads(sweep), over_experts(sweep)
    known = [p for p in references(sweep).values() if p not in lines6[FAME]]
    figures = {
        FIGURES[0]: (lines5, [p for points in lines5.values() for p in points]),
        f'{FIGURES[1]}, H = {at}': (lines6, [*known, *lines6[FAME]]),
    }
    parts = [
        f'# Heads and experts on {sweep["dataset"]}: {card["users"]:,} users, '
        f'{card["items"]:,} items\n',
        f'    {sweep["command"]}\n',
        'Leave one out, every user against the whole catalogue, a tie counts against the target; '
        'the best epoch by validation NDCG@20, masked. Mean and sample standard deviation over so '
        'many seeds as the row says; one seed has none. Bold is the best of its line by '
        'validation NDCG@20, masked, mean over seeds. FAME is fine-tuned from the SASRec of the '
        'same heads and seed; with one head and one expert it is no SASRec, as the paper has it, '
        "but keeps FFN' and W_f (eqs. 7 and 9). Seconds are of training, means over seeds.\n",
    ]
    for title, (lines, points) in figures.items():
        chosen = [best(several) for several in lines.values()]
        parts.append(f'## {title}\n')
        for protocol in judge.PROTOCOLS:
            parts += [f'### {protocol.capitalize()}\n', *_table(points, chosen, protocol), '']
    parts += [_chosen(lines5, lines6), *machine_text(sweep['points'])]
    if sweep['missing']:
        parts.append(f'Not done: {", ".join(sweep["missing"])}.\n')
    return '\n'.join(parts)


def _table(points: Points, chosen: Sequence[Any], protocol: str) -> list[str]:
    head = ['model', 'H', 'N', 'seeds']
    head += [f'{split} {metric.upper()}' for split in SPLITS for metric in METRICS]
    head += ['epochs', 'seconds', 'parameters']
    rows = [_cells(point, point in chosen, protocol) for point in points]
    return [line(head), '|---' * len(head) + '|', *(line(row) for row in rows)]


def _cells(point: Mapping[str, Any], bold: bool, protocol: str) -> list[str]:
    place = [point['title'], str(point['heads']), str(point['experts'] or '')]
    mark = '**' if bold else ''
    return [
        *(f'{mark}{name}{mark}' if name else '' for name in place),
        str(len(point['seeds'])),
        *(figure(**point[split][protocol][metric]) for split in SPLITS for metric in METRICS),
        *training_cells(point),
    ]


def _chosen(lines5: Mapping[str, Points], lines6: Mapping[str, Points]) -> str:
    """A sentence: the best of each line, as a user would choose it."""
    told = [f'{name} H {best(points)["heads"]}' for name, points in lines5.items() if points]
    told += [
        f'{name} N {best(points)["experts"]} at H {points[0]["heads"]}'
        for name, points in lines6.items()
        if points
    ]
    return f'Chosen on validation: {"; ".join(told)}.\n' if told else ''


def draw(sweep: Mapping[str, Any], path: Path) -> None:
    """Draws the test metrics over heads and over experts, masked on the left, unmasked right.

    Bands and whiskers are the standard deviation over seeds; small dots are the seeds. Dashed lines
    are the models that experts are held against.

    Args:
      sweep: as `sweep.collect` has it.
      path: .svg or .png.

    Raises:
      UserError: for another suffix, or when it cannot be written.
    """
    with plots.picture(path, (12.5, 6.2)) as picture:
        grid = picture.subplots(len(METRICS), 2 * len(judge.PROTOCOLS), squeeze=False)
        for row, metric in zip(grid, METRICS):
            for i, protocol in enumerate(judge.PROTOCOLS):
                left, right = row[2 * i : 2 * i + 2]
                right.sharey(left)  # so that the two figures can be held against each other
                _panel(left, over_heads(sweep), {}, 'heads', metric, protocol)
                _panel(right, over_experts(sweep), references(sweep), 'experts', metric, protocol)
                left.set_ylabel(f'test {metric.upper()}, {protocol}')
                right.tick_params(labelleft=False)
                _ticks(left, sweep['heads'], 'heads H')
                _ticks(right, sweep['experts'], f'experts N, H = {sweep["at_heads"]}')
        for axes, name in zip(grid[0], (*FIGURES, *FIGURES)):
            axes.set_title(name, fontsize='medium')
        picture.get_layout_engine().set(w_pad=0.09)
        picture.suptitle(plots.plain(sweep['dataset'], 40), fontsize='large')
        legend_below(picture, grid.ravel())


def _ticks(axes: Any, values: Sequence[int], label: str) -> None:
    axes.set_xscale('log', base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlim(min(values) / 2**0.4, max(values) * 2**0.4)
    axes.set_xlabel(label)


def _panel(
    axes: Any,
    lines: Mapping[str, Points],
    held: Mapping[str, Mapping[str, Any]],
    over: str,
    metric: str,
    protocol: str,
) -> None:
    """One metric over heads or experts: a line a model, dashed those it is held against."""
    for name, point in held.items():
        found = point['test'][protocol][metric]
        color, sd = STYLES[name][0], found['sd'] or 0
        axes.axhline(found['mean'], color=color, ls='--', lw=1.2, label=f'{name}, the same H')
        axes.axhspan(found['mean'] - sd, found['mean'] + sd, color=color, alpha=0.1, lw=0)
    for name, points in lines.items():
        found = [point['test'][protocol][metric] for point in points]
        _line(axes, name, [point[over] for point in points], found)
    axes.grid(color=plots.GREY, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _line(axes: Any, name: str, x: Sequence[int], found: Sequence[Mapping[str, Any]]) -> None:
    color, mark = STYLES[name]
    mean, sd = [f['mean'] for f in found], [f['sd'] or 0 for f in found]
    low, high = ([m + sign * s for m, s in zip(mean, sd)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.errorbar(x, mean, yerr=sd, color=color, marker=mark, ms=5, lw=1.5, elinewidth=0.8)
    axes.plot([], [], color=color, marker=mark, ms=5, lw=1.5, label=name)
    for place, f in zip(x, found):
        several = f['values'] if len(f['values']) > 1 else []
        axes.plot([place] * len(several), several, '.', color=color, ms=3)
