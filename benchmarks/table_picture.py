"""Table 2 as a picture: every model a line, every data set a row of panels."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import published
from fame_jax import evaluate as judge
from fame_jax import plots

OTHERS, FAME, ELSEWHERE, *_ = plots.MARKS


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Draws NDCG@10 of every model, a row a data set, masked on the left and unmasked on the right.

    Args:
      table: its datasets as `verdict.collect` has them.
      path: .svg or .png.

    Raises:
      UserError: for another suffix, or when it cannot be written.
    """
    datasets = table['datasets']
    heights = [len(found['rows']) for found in datasets.values()]
    size = (9, 1.1 + sum(0.8 + 0.27 * rows for rows in heights))
    with plots.picture(path, size) as figure:
        grid = figure.subplots(
            len(datasets),
            len(judge.PROTOCOLS),
            squeeze=False,
            sharey='row',
            height_ratios=[rows + 2 for rows in heights],
        )
        for axes_P, (dataset, found) in zip(grid, datasets.items()):
            for axes, protocol in zip(axes_P, judge.PROTOCOLS):
                _panel(axes, found, protocol)
                axes.set_title(f'{plots.plain(dataset, 30)}, {protocol}', fontsize='medium')
        for axes in grid[-1]:
            axes.set_xlabel('test NDCG@10')
        legend_below(figure, grid.ravel())


def legend_below(figure: Any, panels: Iterable[Any]) -> None:
    """One legend for all panels; what several show stands there once."""
    pairs = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels())]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3, frameon=False)


def _panel(axes: Any, found: Mapping[str, Any], protocol: str) -> None:
    """One data set under one protocol: a line a model."""
    for y, row in enumerate(found['rows']):
        _measured(axes, y, row['test'][protocol]['ndcg@10'], of_fame=row['stage'] == 'finetune')
        for other in found['published'][protocol][row['model']]:
            if 'ndcg@10' in other['values']:
                _printed(axes, y, other)
    floor = found['popularity'][protocol]['ndcg@10']
    axes.axvline(floor, color=plots.GREY, zorder=0, label='popularity')
    axes.set_yticks(range(len(found['rows'])), [row['title'] for row in found['rows']])
    axes.set_ylim(len(found['rows']) - 0.5, -0.5)
    axes.grid(axis='y', color=plots.GREY, linewidth=0.4)
    axes.tick_params(axis='y', length=0)
    axes.spines[['top', 'right', 'left']].set_visible(False)


def _measured(axes: Any, y: int, figure: Mapping[str, Any], of_fame: bool) -> None:
    """Our own: the mean and its deviation, and a tick a seed."""
    color, mark = FAME if of_fame else OTHERS
    label = f'{"FAME" if of_fame else "other models"}, mean ± sd over seeds'
    axes.errorbar(
        figure['mean'], y, xerr=figure['sd'] or 0, fmt=mark, color=color, ms=6, label=label
    )
    axes.plot(figure['values'], [y] * len(figure['values']), '|', color='black', ms=7, mew=0.7)


def _printed(axes: Any, y: int, other: Mapping[str, Any]) -> None:
    """What others printed, hollow."""
    papers = other['place'] == published.PAPER
    color, mark = ('black', 'D') if papers else ELSEWHERE
    label = "FAME's Table 2, masking not told" if papers else 'printed elsewhere'
    axes.plot(
        *(other['values']['ndcg@10'], y, mark), color=color, ms=5, fillstyle='none', label=label
    )
