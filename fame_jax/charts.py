"""The figures of a report, each a panel that a phone can show, in the page's own ink."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import plots
from fame_jax.letters import plain

# A colour that nothing else has; the page says what ink is, light or dark.
INK = '#010203'
WIDTH = 4.4  # inches, about what a phone has
# Hues that are seen on white and on black.
COLORS = ('#1F87C9', '#D9730D', '#00A078', '#B86BA4', '#8A8F98')


def svg(draw: Callable[..., None], *args: Any) -> str:
    """The SVG that draw(*args, path) writes, its ink the colour of the text around it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'figure.svg'
        draw(*args, path)
        return path.read_text(encoding='utf-8').replace(INK, 'currentColor')


@contextlib.contextmanager
def _panel(path: Path, height: float) -> Iterator[Any]:
    """A picture without a ground of its own."""
    import matplotlib

    inked = ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color')
    clear = ('figure.facecolor', 'axes.facecolor', 'savefig.facecolor')
    style = {name: INK for name in inked} | {name: 'none' for name in clear}
    with matplotlib.rc_context(style), plots.picture(path, (WIDTH, height)) as figure:
        yield figure


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]], best_epoch: int | None, path: Path
) -> None:
    """Draws figures by epoch, those of validation in a panel of their own below the losses.

    Args:
      lines: name -> (epoch, value); a name that begins with loss is one.
      best_epoch: marked; None: not told.
      path: .svg or .png.
    """
    losses = {name: line for name, line in lines.items() if name.startswith('loss')}
    others = {name: line for name, line in lines.items() if name not in losses}
    parts = [(names, title) for names, title in ((losses, 'loss'), (others, '')) if names]
    with _panel(path, 0.6 + 1.5 * len(parts)) as figure:
        axes_P = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (named, title) in zip(axes_P, parts):
            for color, line in zip(COLORS * len(named), named.values()):
                axes.plot(*np.array(line, float).T, color=color, marker='.', ms=3)
            axes.set_ylabel(title or plain(next(iter(named)), 30))
            if len(named) > 1:
                axes.legend([plain(name, 26) for name in named], frameon=False, fontsize='small')
            if best_epoch is not None:
                axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle='--')
            _tidy(axes)
        if best_epoch is not None:
            _name_best(axes_P[-1], best_epoch)
        axes_P[-1].set_xlabel('epoch')
        axes_P[-1].xaxis.get_major_locator().set_params(integer=True)


def _name_best(axes: Any, best_epoch: int) -> None:
    late = best_epoch > np.mean(axes.get_xlim())
    axes.annotate(
        f'best: {best_epoch}',
        (best_epoch, 0.04),
        xycoords=('data', 'axes fraction'),
        xytext=(-3 if late else 3, 0),
        textcoords='offset points',
        ha='right' if late else 'left',
        fontsize='small',
    )


def groups(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: Path) -> None:
    """Draws masked NDCG@10 of each group and stage, with its standard error.

    Args:
      rows: as `facts.judge_groups` has them.
      names: stage -> what it is called; these stages are drawn.
      path: .svg or .png.
    """
    with _panel(path, 1.1 + 0.42 * len(rows)) as figure:
        axes = figure.subplots()
        for s, (stage, name) in enumerate(names.items()):
            color, mark = COLORS[s], plots.MARKS[s][1]
            found = [row['figures'][stage]['masked'] for row in rows]
            y = np.arange(len(rows)) + 0.2 * (s - (len(names) - 1) / 2)
            x, error = ([one[key] for one in found] for key in ('ndcg@10', 'error'))
            label = plain(name, 40)
            axes.errorbar(x, y, xerr=error, fmt=mark, color=color, ms=5, lw=1, label=label)
        axes.set_yticks(range(len(rows)), [row['name'] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.locator_params(axis='x', nbins=5)
        axes.set_xlabel('masked NDCG@10 ± standard error')
        _tidy(axes)
        figure.legend(loc='outside upper left', frameon=False, fontsize='small')


def gates(heads: Sequence[Mapping[str, Any]], edges: Sequence[float], path: Path) -> None:
    """Draws how the gate's share of each head is spread over users, its mean marked.

    Args:
      heads: share and histogram of each, as `facts.use` has them.
      edges: of the histograms' bins.
      path: .svg or .png.
    """
    with _panel(path, 0.6 + 0.75 * len(heads)) as figure:
        axes_H = figure.subplots(len(heads), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for h, (axes, head) in enumerate(zip(axes_H, heads)):
            count = np.array(head['histogram'])
            axes.stairs(count / count.sum(), edges, fill=True, color=COLORS[0], alpha=0.8)
            axes.axvline(head['share'], color=INK, linewidth=1)
            axes.set_ylabel(f'head {h + 1}')
            axes.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
            _tidy(axes)
        axes_H[-1].set(
            xlim=(edges[0], edges[-1]), xlabel="the gate's share (line: mean), by share of users"
        )
        axes_H[-1].locator_params(axis='x', nbins=6, steps=[1, 2, 5, 10])
        axes_H[-1].xaxis.set_major_formatter(lambda value, _: f'{value:.0%}')


def _tidy(axes: Any) -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color=INK, alpha=0.15, linewidth=0.5)
    axes.set_axisbelow(True)
