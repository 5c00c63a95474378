"""Pictures of the figures in a run's records, as SVG or PNG.

In an SVG text stays text, for two reasons: it can be searched and copied, and the viewer finds the
letters of scripts that matplotlib's own font lacks and sets right-to-left ones as they should be.
The price is that a viewer without DejaVu Sans sets it a little wider or narrower.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import records
from fame_jax.errors import UserError
from fame_jax.letters import plain

# matplotlib takes a second to import, so that only those who draw wait for it.

STYLE = {
    'font.size': 9,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'fame_jax',  # the same picture is the same bytes
    'text.parse_math': False,  # a $ in a name is a $
    'text.usetex': False,
}
FIGURES = {'neighbours': 'neighbours agree', 'probe': 'a linear map reads it'}
NOTE = '0 chance, 1 always. Framed: the matching of heads and facets.'
SHADES = 'Blues'  # from light to dark, and so it is in grey too

# The hues of Okabe and Ito without the yellow, which white swallows; shapes for who sees none.
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
HIT = {'facecolor': '#FBE3A1', 'edgecolor': 'none', 'pad': 1.5}

# Of an explanation: items of the history, lists side by side, recommended items across.
ROWS, LISTS, COLUMNS = 50, 4, 12


def heads_by_facets(stages: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws every head against every facet, a column of matrices a stage, a row a figure.

    Shades run from 0 to 1 in all of them, and the numbers stand in the cells. The row 'all' is of
    the heads side by side.

    Args:
      stages: name of a stage, as 'text before' -> what `probe.compare` found there; at least one,
        and all of the same heads and facets.
      path: .svg or .png.

    Raises:
      UserError: for another suffix, or when it cannot be written.
    """
    first = next(iter(stages.values()))
    heads, facets = np.shape(first['neighbours'])
    names = [plain(name, 24) for name in first['facets']]
    slanted = {'rotation': 35, 'ha': 'right', 'rotation_mode': 'anchor'}
    turn = slanted if max(map(len, names)) > 9 else {}
    width = 0.3 + max(0.62 * facets, 1.1)
    height = 1.2 + len(FIGURES) * (0.7 + 0.36 * heads) + (0.8 if turn else 0)
    with picture(path, (max(4, 1 + len(stages) * width), height)) as figure:
        grid = figure.subplots(len(FIGURES), len(stages), sharex=True, squeeze=False)
        for row, (key, meaning) in zip(grid, FIGURES.items()):
            for axes, found in zip(row, stages.values()):
                _matrix(axes, found, key)
            row[0].set_yticks(*_heads(heads))
            row[0].set_ylabel(meaning)
        for axes, name in zip(grid.T, stages):
            axes[0].set_title(plain(name, int(15 * width)), fontsize='medium', pad=8)
            axes[-1].set_xticks(np.arange(facets) + 0.5, names, **turn)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        figure.supxlabel(NOTE, fontsize='small', color='#444444')


def item_map(
    xy: np.ndarray, labels: Mapping[str, Sequence[str | Iterable[str] | None]], path: Path
) -> None:
    """Draws the items in the plane, a panel a facet, its eight commonest labels in colour.

    Args:
      xy: float [B, 2], as `probe.flatten` has it.
      labels: facet -> each item's label, '' or None without one, or its several labels; an item
        that has several of the eight is drawn as the rarest. At least one facet.
      path: .svg or .png.

    Raises:
      UserError: for another suffix, or when it cannot be written.
    """
    columns = min(3, len(labels))
    rows = math.ceil(len(labels) / columns)
    with picture(path, (4.2 * columns, 5.1 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (facet, of_items) in zip(grid, labels.items()):
            _scatter(axes, xy, [_names(of_item) for of_item in of_items])
            axes.set_title(plain(facet, 50), fontsize='medium')


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib Figure of a size in inches, written whole to the path in the end."""
    path = Path(path)
    suffix = path.suffix.lower().lstrip('.')
    if suffix not in ('svg', 'png'):
        raise UserError(f'{path}: a picture is .svg or .png; name the file so')
    # Not pyplot, which keeps every figure and looks for a screen.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph .* missing')  # the viewer may have it
        figure = Figure(figsize=size, layout='constrained')
        yield figure
        undated = {'Date': None} if suffix == 'svg' else {}
        with records.replacing(path) as file:
            figure.savefig(file, format=suffix, dpi=200, metadata=undated)


def _matrix(axes: Any, found: Mapping[str, Any], key: str) -> None:
    """One figure of one stage: heads down, facets across, the whole vector a little below."""
    from matplotlib.patches import Rectangle

    value_HM = np.array(found[key])
    heads, facets = value_HM.shape
    for top, value_RM in ((0, value_HM), (heads + 0.2, np.array([found['whole'][key]]))):
        edges = top + np.arange(len(value_RM) + 1), np.arange(facets + 1)
        axes.pcolormesh(
            edges[1], edges[0], value_RM, cmap=SHADES, vmin=0, vmax=1, edgecolors='w', linewidth=1
        )
        for (r, m), value in np.ndenumerate(value_RM):
            color = 'white' if value > 0.65 else 'black'
            axes.text(m + 0.5, top + r + 0.5, _number(value), ha='center', va='center', color=color)
    for h, m in found['matching']:
        axes.add_patch(Rectangle((m, h), 1, 1, fill=False, linewidth=1.4, clip_on=False))
    axes.set(ylim=(heads + 1.2, 0), xlim=(0, facets), yticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _number(value: float) -> str:
    """Two decimals, the leading 0 left out, and no -.00."""
    text = f'{value:.2f}'.replace('-0.00', '0.00')
    return text.replace('0.', '.', 1)


def _heads(heads: int) -> tuple[list[float], list[str]]:
    """Where the rows of a matrix are, and what they are called."""
    places = [h + 0.5 for h in range(heads)]
    return [*places, heads + 0.7], [*(f'head {h + 1}' for h in range(heads)), 'all']


def _names(of_item: str | Iterable[str] | None) -> list[str]:
    """An item's labels of a facet, each once; an empty name is none."""
    several = [of_item] if isinstance(of_item, str) else of_item or []
    return [name for name in dict.fromkeys(several) if name]


def _scatter(axes: Any, xy: np.ndarray, names: list[list[str]]) -> None:
    """One panel; the points are one image inside an SVG, so that thousands stay small."""
    common = [
        n for n, _ in Counter(n for several in names for n in several).most_common(len(MARKS))
    ]
    shown = np.array([max((common.index(n) for n in s if n in common), default=-1) for s in names])
    others = axes.scatter(*xy[shown < 0].T, s=4, color=GREY, linewidths=0, rasterized=True)
    handles = [
        axes.scatter(
            *xy[shown == c].T, s=9, color=color, marker=mark, linewidths=0, rasterized=True
        )
        for c, (color, mark) in enumerate(MARKS[: len(common)])
    ]
    axes.set_aspect('equal', adjustable='datalim')
    legend = axes.legend(
        [*handles, others],
        [*(plain(name, 26) for name in common), 'other or none'],
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


def explanation(found: Mapping[str, Any], path: Path) -> None:
    """Draws why these items: what each expert of each head attends to, and each head's list.

    For a model without heads: how the score of each item changes without each of the history.

    Args:
      found: what `explain.explain` returns, without a fallback; of a long history the last items
        are drawn.
      path: .svg or .png; readable at 1200 pixels.

    Raises:
      UserError: for another suffix, or when it cannot be written.
    """
    rows = min(len(found['history']), ROWS)
    if 'heads' not in found:
        with picture(path, (12, 3.4 + 0.24 * rows)) as figure:
            _without(figure.subplots(), found, rows)
            figure.suptitle(_next(found), fontsize='medium')
        return
    lists = _lists(found)
    strips = [lists[n : n + LISTS] for n in range(0, len(lists), LISTS)]
    longest = max(len(entries) for _, entries in lists)
    heights = [1.5 + 0.24 * rows, *[0.5 + 0.2 * longest] * len(strips)]
    with picture(path, (12, 0.4 + sum(heights))) as figure:
        above, *below = figure.subfigures(1 + len(strips), 1, height_ratios=heights)
        _attention(above, found, rows)
        for part, strip in zip(below, strips):
            for axes, (name, entries) in zip(part.subplots(1, LISTS, squeeze=False)[0], strip):
                _list(axes, name, entries, found['target'])
            for axes in part.axes:
                axes.set_axis_off()
        figure.suptitle(_next(found), fontsize='medium')


def _next(found: Mapping[str, Any]) -> str:
    """What came next, for the head of a picture."""
    target = found['target']
    if not target:
        return plain(found['model'], 90)
    place = f'rank {target["rank"]:,}' if target['rank'] else 'may not be recommended'
    return f'{plain(found["model"], 60)}. Next came {_title(target, 70)}: {place}'


def _title(entry: Mapping[str, Any], most: int) -> str:
    return plain(entry['title'] or entry['item'], most)


def _lists(found: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The list of the whole model, each head's own, and that of equal gates, by name."""
    heads = [(f'head {h}: {x["share"]:.0%}', x['top']) for h, x in enumerate(found['heads'], 1)]
    return [('recommended', found['recommended']), *heads, ('equal gates', found['equal_gates'])]


def _attention(figure: Any, found: Mapping[str, Any], rows: int) -> None:
    """The history down; across, all in all, then each head's experts under the router's weights."""
    heads = found['heads']
    experts = len(heads[0]['router'])
    axes_C = figure.subplots(
        2,
        1 + len(heads),
        sharey='row',
        width_ratios=[max(1.2, experts / 6), *[experts] * len(heads)],
        height_ratios=[1, rows],
    )
    most = max(np.max(np.array(head['attention'])[:, -rows:]) for head in heads)
    carried_L1 = np.array(found['carried'])[-rows:, None]
    axes_C[0, 0].set_axis_off()
    axes_C[0, 0].text(1, 0.5, "router's weights", ha='right', va='center')
    _cells(axes_C[1, 0], carried_L1, carried_L1.max(), numbers=True)
    axes_C[1, 0].set_yticks(
        np.arange(rows) + 0.5, [_title(item, 46) for item in found['history'][-rows:]]
    )
    axes_C[1, 0].set_title('attended', fontsize='medium')
    for h, (head, axes_R) in enumerate(zip(heads, axes_C[:, 1:].T), 1):
        router_1N = np.array([head['router']])
        _cells(axes_R[0], router_1N, 1, numbers=experts * len(heads) <= 32)
        _cells(axes_R[1], np.array(head['attention'])[:, -rows:].T, most, numbers=False)
        axes_R[0].set_title(f'head {h}, gate {head["share"]:.0%}', fontsize='medium')
        step = -(-experts * len(heads) // 32)
        axes_R[1].set_xticks(np.arange(experts)[::step] + 0.5, np.arange(1, experts + 1)[::step])
        axes_R[1].set_xlabel('expert')


def _cells(axes: Any, value_RC: np.ndarray, most: float, numbers: bool) -> None:
    """Shares as shades, from 0 to the most."""
    axes.pcolormesh(value_RC, cmap=SHADES, vmin=0, vmax=most, edgecolors='w', linewidth=0.5)
    for (r, c), value in np.ndenumerate(value_RC if numbers else np.zeros((0, 0))):
        color = 'white' if value > 0.65 * most else 'black'
        axes.text(c + 0.5, r + 0.5, _number(value), ha='center', va='center', color=color, size=8)
    axes.set(ylim=(len(value_RC), 0), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _list(
    axes: Any, name: str, entries: Sequence[Mapping[str, Any]], target: Mapping[str, Any] | None
) -> None:
    """One list, the best first, the target in bold on a ground of its own."""
    axes.set(xlim=(0, 1), ylim=(len(entries) + 0.5, -0.5))
    axes.text(0, 0, name, weight='bold', va='center')
    for place, entry in enumerate(entries, 1):
        hit = target is not None and entry['item'] == target['item']
        about = {'weight': 'bold', 'bbox': HIT} if hit else {}
        text = f'{place}  {_title(entry, 36 if hit else 40)}'
        axes.text(0, place, text, va='center', size=8, **about)


def _without(axes: Any, found: Mapping[str, Any], rows: int) -> None:
    """How each recommended item's score changes without each item of the history."""
    shown = found['recommended'][:COLUMNS]
    change_LK = np.array([entry['without'] or [0.0] for entry in shown], float).T[-rows:]
    most = max(float(np.abs(change_LK).max(initial=0)), 1e-9)
    axes.pcolormesh(change_LK, cmap='RdBu', vmin=-most, vmax=most, edgecolors='w', linewidth=0.5)
    for (r, c), value in np.ndenumerate(change_LK):
        color = 'white' if abs(value) > 0.65 * most else 'black'
        axes.text(
            c + 0.5,
            r + 0.5,
            f'{round(value, 1) + 0.0:+.1f}',
            ha='center',
            va='center',
            color=color,
            size=8,
        )
    slanted = {'rotation': 30, 'ha': 'right', 'rotation_mode': 'anchor'}
    names = [f'{place}  {_title(entry, 36)}' for place, entry in enumerate(shown, 1)]
    axes.set_xticks(np.arange(len(shown)) + 0.5, names, **slanted)
    axes.set_yticks(np.arange(rows) + 0.5, [_title(x, 46) for x in found['history'][-rows:]])
    axes.set(ylim=(rows, 0))
    axes.set_title(
        'the only item of the history: nothing to leave out'
        if len(found['history']) < 2
        else 'how the score changes without the item of the history',
        fontsize='medium',
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
