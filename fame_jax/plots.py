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


def plain(name: str, most: int) -> str:
    """A name in one line of at most so many letters, without what is no letter in a file."""
    line = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(name)).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + '…'


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
