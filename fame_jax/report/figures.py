"""All drawings of a run, by matplotlib, as SVG files.

Text stays text in the SVG: it can be searched, and the viewer's fonts supply scripts that
matplotlib's font lacks. A viewer without DejaVu Sans sets it slightly wider or narrower.
matplotlib is imported when the first figure is drawn, since that takes a second.
"""

import contextlib
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import run_dir
from fame_jax.screen import one_line

STYLE = {
    'font.size': 9,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'fame_jax',  # equal figures are equal bytes
    'text.parse_math': False,  # a $ in a name is a $
    'text.usetex': False,
}
AGREEMENT = {'neighbours': 'neighbour agreement', 'probe': 'linear probe'}
SHADES = 'Blues'
# The colours of Okabe and Ito except yellow, which is invisible on white, each with a marker.
MARKS = (
    ('#0072B2', 'o'),
    ('#E69F00', 's'),
    ('#009E73', '^'),
    ('#D55E00', 'D'),
    ('#56B4E9', 'v'),
    ('#CC79A7', 'P'),
    ('#000000', 'X'),
    ('#8A5A00', '*'),
)
GREY = '#D4D4D4'
HIGHLIGHT = {'facecolor': '#FBE3A1', 'edgecolor': 'none', 'pad': 1.5}

# Charts inside the page: transparent, in colours that are visible on white and on black. INK stands
# for the colour of the page's text, which the browser knows.
INK = '#010203'
LINE_COLORS = (
    *('#1F87C9', '#D9730D', '#00A078', '#B86BA4', '#8A8F98'),
    *('#7A74D6', '#A98A1E', '#D9534F'),
)
WIDTH = 4.4  # inches, the width of a phone's screen

# Largest explanation: items of the history, lists per row, recommended items.
MAX_ROWS, LISTS_PER_ROW, MAX_COLUMNS = 50, 4, 12


def to_svg(draw: Callable[..., None], *args: Any) -> str:
    """The SVG that `draw(*args, path)` writes; INK becomes the colour of the surrounding text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'figure.svg'
        draw(*args, path)
        return path.read_text(encoding='utf-8').replace(INK, 'currentColor')


@contextlib.contextmanager
def new_figure(path: Path, size: tuple[float, float], **style: Any) -> Iterator[Any]:
    """A matplotlib Figure, `size` in inches, which is written to `path` at the end, or not at all.

    Raises:
      UserError: when it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure  # pyplot would keep every figure and look for a display

    with matplotlib.rc_context(STYLE | style), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph .* missing')  # the viewer may have it
        figure = Figure(figsize=size, layout='constrained')
        yield figure
        with run_dir.atomic_write(path) as file:
            figure.savefig(file, format='svg', dpi=200, metadata={'Date': None})


def new_chart(path: Path, height: float) -> contextlib.AbstractContextManager[Any]:
    """A figure inside the page: transparent, its lines and letters in INK."""
    ink = ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color')
    clear = ('figure.facecolor', 'axes.facecolor', 'savefig.facecolor')
    style = dict.fromkeys(ink, INK) | dict.fromkeys(clear, 'none')
    return new_figure(path, (WIDTH, height), **style)


def tidy(axes: Any) -> None:
    """Leaves two of the four spines, and draws a faint grid below the values."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color=INK, alpha=0.15, linewidth=0.5)
    axes.set_axisbelow(True)


# Charts inside the page.


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]], best_epoch: int | None, path: Path
) -> None:
    """Draws values by epoch: losses above, the validation metric below.

    Args:
      lines: name -> (epoch, value); names of losses begin with 'loss'.
      best_epoch: marked by a dashed line; None: unknown.
      path: of the SVG file.
    """
    losses = {name: line for name, line in lines.items() if name.startswith('loss')}
    others = {name: line for name, line in lines.items() if name not in losses}
    parts = [(label, part) for label, part in (('loss', losses), ('', others)) if part]
    with new_chart(path, 0.6 + 1.5 * len(parts)) as figure:
        axes_P = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, part) in zip(axes_P, parts):
            for color, line in zip(LINE_COLORS * len(part), part.values()):
                axes.plot(*np.array(line, float).T, color=color, marker='.', ms=3)
            axes.set_ylabel(label or one_line(next(iter(part)), 30))
            if len(part) > 1:
                axes.legend([one_line(name, 26) for name in part], frameon=False, fontsize='small')
            if best_epoch is not None:
                axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle='--')
            tidy(axes)
        best = '' if best_epoch is None else f' (dashed: the best, {best_epoch})'
        axes.set_xlabel('epoch' + best)
        axes.xaxis.get_major_locator().set_params(integer=True)


def groups(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], protocol: str, path: Path
) -> None:
    """Draws NDCG@10 of each group of users with its standard error.

    Args:
      rows: as `groups.group_metrics` returns them.
      names: stage -> the model's name; these stages are drawn, at most `len(LINE_COLORS)`.
      protocol: 'masked' or 'unmasked'.
      path: of the SVG file.
    """
    height = 0.8 + 0.18 * len(names) + max(0.42, 0.12 * len(names)) * len(rows)
    with new_chart(path, height) as figure:
        axes = figure.subplots()
        for s, (stage, name) in enumerate(names.items()):
            found = [row['figures'][stage][protocol] for row in rows]
            axes.errorbar(
                [metrics['ndcg@10'] for metrics in found],
                np.arange(len(rows)) + min(0.2, 0.8 / len(names)) * (s - (len(names) - 1) / 2),
                xerr=[metrics['error'] for metrics in found],
                fmt=MARKS[s][1],
                color=LINE_COLORS[s],
                ms=5,
                lw=1,
                label=one_line(name, 40),
            )
        axes.set_yticks(range(len(rows)), [row['name'] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.locator_params(axis='x', nbins=5)
        axes.set_xlabel(f'{protocol} NDCG@10 ± standard error')
        tidy(axes)
        figure.legend(loc='outside upper left', frameon=False, fontsize='small')


def gates(heads: Sequence[Mapping[str, Any]], edges: Sequence[float], path: Path) -> None:
    """Draws a histogram over users of the gate's weight of each head, its mean marked.

    Args:
      heads: 'share' and 'histogram' of each head, as `groups.usage` returns them, and its 'name'
        where it has one.
      edges: of the histograms' bins.
      path: of the SVG file.
    """
    with new_chart(path, 0.6 + 0.75 * len(heads)) as figure:
        axes_H = figure.subplots(len(heads), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for h, (axes, head) in enumerate(zip(axes_H, heads)):
            count = np.array(head['histogram'])
            axes.stairs(count / count.sum(), edges, fill=True, color=LINE_COLORS[0], alpha=0.8)
            axes.axvline(head['share'], color=INK, linewidth=1)
            axes.set_ylabel(head_name(h, head))
            axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
            tidy(axes)
        axes.set(xlim=(edges[0], edges[-1]), xlabel="gate's weight (line: mean), by share of users")
        axes.locator_params(axis='x', nbins=6, steps=[1, 2, 5, 10])
        axes.xaxis.set_major_formatter(lambda value, _: f'{value:.0%}')


def head_name(index: int, head: Mapping[str, Any]) -> str:
    """A head's 'name' in one short line; without one, 'head 1' for the index 0."""
    return one_line(head.get('name') or f'head {index + 1}', 24)


# Figures of FAME+: heads by facets, and the items in the plane.


def heads_by_facets(stages: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws the agreement of every head with every facet, one column of matrices per stage.

    All matrices share one scale from 0 to 1. The row 'all' is of the concatenated heads.

    Args:
      stages: title -> what `facet_probe.compare` returned; at least one, all of the same heads and
        facets. One may also have 'heads', their names.
      path: of the SVG file.

    Raises:
      UserError: when it cannot be written.
    """
    first = next(iter(stages.values()))
    heads, facets = np.shape(first['neighbours'])
    names = [one_line(name, 24) for name in first['facets']]
    known = next((of['heads'] for of in stages.values() if 'heads' in of), [None] * heads)
    names_H = [head_name(h, {'name': name} if name else {}) for h, name in enumerate(known)]
    slanted = {'rotation': 35, 'ha': 'right', 'rotation_mode': 'anchor'}
    turn = slanted if max(map(len, names)) > 9 else {}
    width = 0.3 + max(0.62 * facets, 1.1)
    height = 1.2 + len(AGREEMENT) * (0.7 + 0.36 * heads) + (0.8 if turn else 0)
    with new_figure(path, (max(4, 1 + len(stages) * width), height)) as figure:
        grid = figure.subplots(len(AGREEMENT), len(stages), sharex=True, squeeze=False)
        for axes_S, (key, label) in zip(grid, AGREEMENT.items()):
            for axes, agreement in zip(axes_S, stages.values()):
                _agreement(axes, agreement, key)
            axes_S[0].set_yticks(
                [*np.arange(heads) + 0.5, heads + 0.7],
                [*names_H, 'all'],
            )
            axes_S[0].set_ylabel(label)
        for axes_R, name in zip(grid.T, stages):
            axes_R[0].set_title(one_line(name, int(15 * width)), fontsize='medium', pad=8)
            axes_R[-1].set_xticks(np.arange(facets) + 0.5, names, **turn)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        note = '0: chance, 1: perfect. Framed: each head and its facet.'
        figure.supxlabel(note, fontsize='small', color='#444444')


def _agreement(axes: Any, agreement: Mapping[str, Any], key: str) -> None:
    """One matrix, heads by facets, and below it the row of all heads together."""
    from matplotlib.patches import Rectangle

    heads, facets = np.shape(agreement[key])
    _heat(axes, np.array(agreement[key]), 1, write=_short)
    _heat(axes, np.array([agreement['whole'][key]]), 1, top=heads + 0.2, write=_short)
    for h, m in agreement['matching']:
        axes.add_patch(Rectangle((m, h), 1, 1, fill=False, linewidth=1.4, clip_on=False))
    axes.set(ylim=(heads + 1.2, 0), xlim=(0, facets), yticks=[])


def _heat(
    axes: Any,
    value_RC: np.ndarray,
    most: float,
    *,
    top: float = 0,
    signed: bool = False,
    write: Callable[[float], str] | None = None,
) -> None:
    """Draws a matrix as shades from 0 (or -most) to most, with numbers if `write` formats them."""
    rows, columns = value_RC.shape
    axes.pcolormesh(
        np.arange(columns + 1),
        top + np.arange(rows + 1),
        value_RC,
        cmap='RdBu' if signed else SHADES,
        vmin=-most if signed else 0,
        vmax=most,
        edgecolors='w',
        linewidth=0.8,
    )
    for (r, c), value in np.ndenumerate(value_RC) if write else ():
        color = 'white' if abs(value) > 0.65 * most else 'black'
        place = {'ha': 'center', 'va': 'center', 'color': color, 'size': 8}
        axes.text(c + 0.5, top + r + 0.5, write(value), **place)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _short(value: float) -> str:
    """Two decimals without the leading 0; -.00 is .00."""
    return f'{value:.2f}'.replace('-0.00', '0.00').replace('0.', '.', 1)


def item_map(
    xy_BX: np.ndarray, labels: Mapping[str, Sequence[str | Iterable[str] | None]], path: Path
) -> None:
    """Draws items in the plane, one panel per facet, its eight most frequent labels in colour.

    Args:
      xy_BX: float [B, 2], as `facet_probe.flatten` returns it.
      labels: facet -> each item's label ('' or None: no label) or several labels; an item with
        several of the eight is drawn as the rarest of them. At least one facet.
      path: of the SVG file.

    Raises:
      UserError: when it cannot be written.
    """
    columns = min(3, len(labels))
    rows = math.ceil(len(labels) / columns)
    with new_figure(path, (4.2 * columns, 5.1 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (facet, label_B) in zip(grid, labels.items()):
            _scatter(axes, xy_BX, [_as_list(label) for label in label_B])
            axes.set_title(one_line(facet, 50), fontsize='medium')


def _as_list(label: str | Iterable[str] | None) -> list[str]:
    several = [label] if isinstance(label, str) else label or []
    return [name for name in dict.fromkeys(several) if name]


def _scatter(axes: Any, xy_BX: np.ndarray, labels: Sequence[Sequence[str]]) -> None:
    """One panel; points are rasterized inside the SVG, which keeps files of thousands small."""
    count = Counter(name for several in labels for name in several)
    common = [name for name, _ in count.most_common(len(MARKS))]
    place = {name: c for c, name in enumerate(common)}
    rarest_B = np.array(
        [max((place.get(n, -1) for n in several), default=-1) for several in labels]
    )
    plain = {'linewidths': 0, 'rasterized': True}
    others = axes.scatter(*xy_BX[rarest_B < 0].T, s=4, color=GREY, **plain)
    handles = [
        axes.scatter(*xy_BX[rarest_B == c].T, s=9, color=color, marker=mark, **plain)
        for c, (color, mark) in enumerate(MARKS[: len(common)])
    ]
    axes.set_aspect('equal', adjustable='datalim')
    legend = axes.legend(
        [*handles, others],
        [*(one_line(name, 26) for name in common), 'other or none'],
        loc='upper center',
        bbox_to_anchor=(0.5, 0),
        ncols=2,
        frameon=False,
        markerscale=2,
        fontsize='small',
        handletextpad=0.2,
    )
    for handle in legend.legend_handles:
        handle.set_rasterized(False)


# The explanation of one list.


def explanation(explained: Mapping[str, Any], path: Path) -> None:
    """Draws an explanation: attention of each head's experts and the list of each head.

    For a model without heads: the change of each score when one item of the history is removed.

    Args:
      explained: an Explanation in its JSON form, without a fallback. Of a long history the last
        items are drawn.
      path: of the SVG file, readable at 1200 pixels.

    Raises:
      UserError: when it cannot be written.
    """
    rows = min(len(explained['history']), MAX_ROWS)
    if 'heads' not in explained:
        with new_figure(path, (12, 3.4 + 0.24 * rows)) as figure:
            _removals(figure.subplots(), explained, rows)
            figure.suptitle(_heading(explained), fontsize='medium')
        return
    heads = [
        (f'{head_name(h, x)}: {x["share"]:.0%}', x['top']) for h, x in enumerate(explained['heads'])
    ]
    lists = [
        ('recommended', explained['recommended']),
        *heads,
        ('equal gates', explained['equal_gates']),
    ]
    strips = [lists[n : n + LISTS_PER_ROW] for n in range(0, len(lists), LISTS_PER_ROW)]
    longest = max(len(entries) for _, entries in lists)
    heights = [1.5 + 0.24 * rows, *[0.5 + 0.2 * longest] * len(strips)]
    with new_figure(path, (12, 0.4 + sum(heights))) as figure:
        above, *below = figure.subfigures(1 + len(strips), 1, height_ratios=heights)
        _attention(above, explained, rows)
        for part, strip in zip(below, strips):
            for axes in (axes_C := part.subplots(1, LISTS_PER_ROW, squeeze=False)[0]):
                axes.set_axis_off()
            for axes, (name, entries) in zip(axes_C, strip):
                _list(axes, name, entries, explained['target'])
        figure.suptitle(_heading(explained), fontsize='medium')


def _heading(explained: Mapping[str, Any]) -> str:
    target = explained['target']
    if not target:
        return one_line(explained['model'], 90)
    rank = f'rank {target["rank"]:,}' if target['rank'] else 'excluded from the list'
    return f'{one_line(explained["model"], 60)}. Next item: {_title(target, 70)}, {rank}'


def _title(entry: Mapping[str, Any], most: int) -> str:
    return one_line(entry['title'] or entry['item'], most)


def _attention(figure: Any, explained: Mapping[str, Any], rows: int) -> None:
    """A row per item of the history: total attention, then that of each head's experts."""
    heads = explained['heads']
    experts = len(heads[0]['router'])
    axes_RC = figure.subplots(
        2,
        1 + len(heads),
        sharey='row',
        width_ratios=[max(1.2, experts / 6), *[experts] * len(heads)],
        height_ratios=[1, rows],
    )
    total_L1 = np.array(explained['carried'])[-rows:, None]
    axes_RC[0, 0].set_axis_off()
    axes_RC[0, 0].text(1, 0.5, 'router', ha='right', va='center')
    _heat(axes_RC[1, 0], total_L1, total_L1.max(), write=_short)
    axes_RC[1, 0].set(ylim=(rows, 0), xticks=[])
    axes_RC[1, 0].set_yticks(
        np.arange(rows) + 0.5, [_title(item, 46) for item in explained['history'][-rows:]]
    )
    axes_RC[1, 0].set_title('attention', fontsize='medium')
    attention_HNL = np.array([head['attention'] for head in heads])[..., -rows:]
    few = experts * len(heads) <= 32  # so that the numbers have room
    step = -(-experts * len(heads) // 32)
    for h, (head, axes_R) in enumerate(zip(heads, axes_RC[:, 1:].T)):
        _heat(axes_R[0], np.array([head['router']]), 1, write=_short if few else None)
        _heat(axes_R[1], attention_HNL[h].T, attention_HNL.max())
        axes_R[0].set(ylim=(1, 0), xticks=[])
        name = head_name(h, head)
        axes_R[0].set_title(f'{name}, gate {head["share"]:.0%}', fontsize='medium')
        axes_R[1].set(ylim=(rows, 0), xlabel='expert')
        axes_R[1].set_xticks(np.arange(experts)[::step] + 0.5, np.arange(1, experts + 1)[::step])


def _list(
    axes: Any, name: str, entries: Sequence[Mapping[str, Any]], target: Mapping[str, Any] | None
) -> None:
    """One list, best first, with the target highlighted."""
    axes.set(xlim=(0, 1), ylim=(len(entries) + 0.5, -0.5))
    axes.text(0, 0, name, weight='bold', va='center')
    for place, entry in enumerate(entries, 1):
        hit = target is not None and entry['item'] == target['item']
        style = {'weight': 'bold', 'bbox': HIGHLIGHT} if hit else {}
        line = f'{place}  {_title(entry, 36 if hit else 40)}'
        axes.text(0, place, line, va='center', size=8, **style)


def _removals(axes: Any, explained: Mapping[str, Any], rows: int) -> None:
    """Change of each recommended item's score when one item of the history is removed."""
    shown = explained['recommended'][:MAX_COLUMNS]
    change_LK = np.array([entry['without'] or [0.0] for entry in shown], float).T[-rows:]
    most = max(float(np.abs(change_LK).max(initial=0)), 1e-9)
    _heat(axes, change_LK, most, signed=True, write='{:+.2g}'.format)
    slanted = {'rotation': 30, 'ha': 'right', 'rotation_mode': 'anchor'}
    names = [f'{place}  {_title(entry, 36)}' for place, entry in enumerate(shown, 1)]
    axes.set_xticks(np.arange(len(shown)) + 0.5, names, **slanted)
    axes.set_yticks(
        np.arange(rows) + 0.5, [_title(item, 46) for item in explained['history'][-rows:]]
    )
    axes.set(ylim=(rows, 0))
    several = len(explained['history']) > 1
    title = 'change of the score when the item of the history is removed'
    axes.set_title(title if several else 'a history of one item', fontsize='medium')
