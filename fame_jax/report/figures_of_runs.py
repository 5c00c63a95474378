"""Drawings of several runs side by side, and of a sweep; see figures.py."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax.errors import UserError
from fame_jax.report.figures import GREY, INK, LINE_COLORS, MARKS, new_chart, new_figure, tidy
from fame_jax.screen import one_line

MOST = len(LINE_COLORS)  # runs in one chart, so that each has its own colour
Line = Sequence[tuple[int, float]]  # (epoch, value)

PANELS, COLUMNS = 12, 3  # of a sweep
NOT_GIVEN = '(not given)'


def curves(
    lines: Mapping[str, Sequence[Line]],
    best: Mapping[str, Sequence[int | None]],
    label: str,
    path: Path,
) -> None:
    """Draws the validation metric of several runs by epoch; a run has a line for each seed.

    Args:
      lines: run -> a line of each seed, at most `MOST` runs.
      best: run -> the best epoch of each seed, marked where it is known.
      label: of the values.
      path: of the SVG file.
    """
    with new_chart(path, 2.3 + 0.17 * len(lines)) as figure:
        axes = figure.subplots()
        for (name, of_seeds), color, (_, mark) in zip(lines.items(), LINE_COLORS, MARKS):
            width = 1.4 if len(of_seeds) == 1 else 0.8
            for number, (line, epoch) in enumerate(zip(of_seeds, best[name])):
                text = one_line(name, 44) if number == 0 else '_'
                axes.plot(*np.array(line, float).T, color=color, lw=width, label=text)
                found = [value for at, value in line if at == epoch]
                axes.plot([epoch] * len(found), found, mark, color=color, ms=5)
        axes.set(xlabel='epoch (marked: the best one)', ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
        figure.legend(loc='outside upper left', frameon=False, fontsize='small')


def intervals(rows: Mapping[str, tuple[float, float, float]], label: str, path: Path) -> None:
    """Draws a difference and its interval for each run, next to a line at 0.

    Args:
      rows: run -> (difference, low, high).
      label: of the differences.
      path: of the SVG file.
    """
    with new_chart(path, 0.6 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        for place, (difference, low, high) in enumerate(rows.values()):
            color = LINE_COLORS[0] if low > 0 else LINE_COLORS[1] if high < 0 else LINE_COLORS[4]
            ends = [[difference - low], [high - difference]]
            axes.errorbar([difference], [place], xerr=ends, fmt='o', color=color, ms=5, capsize=2)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [one_line(name, 28) for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.locator_params(axis='x', nbins=5)
        axes.set_xlabel(label)
        tidy(axes)


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    untrained: Mapping[str, tuple[float, float]],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Draws two metrics of each run against each other, a small mark for each seed.

    Args:
      points: run -> the values of its seeds, of the horizontal and of the vertical axis; at most
        `MOST` runs. The large mark is their mean.
      untrained: name of a baseline -> its two values; hollow marks.
      labels: of the axes.
      path: of the SVG file.
    """
    names = len(points) + len(untrained)
    with new_chart(path, 2.3 + 0.17 * names) as figure:
        axes = figure.subplots()
        for (name, (x, y)), color, (_, mark) in zip(points.items(), LINE_COLORS, MARKS):
            at = [statistics.fmean(x)], [statistics.fmean(y)]
            axes.plot(*at, mark, color=color, ms=7, label=one_line(name, 44))
            if len(x) > 1:
                axes.plot(x, y, mark, color=color, ms=3, alpha=0.6)
        for (name, (x, y)), (_, mark) in zip(untrained.items(), MARKS):
            axes.plot([x], [y], mark, color=INK, mfc='none', ms=7, label=one_line(name, 44))
        axes.set(xlabel=labels[0], ylabel=labels[1])
        tidy(axes)
        figure.legend(loc='outside upper left', frameon=False, fontsize='small')


def sweep(record: Mapping[str, Any], path: Path) -> None:
    """Draws a sweep: a panel for each flag with several values, validation against the value.

    The line joins the settings that differ from the best one in this flag alone, a bar is the
    standard deviation over seeds, faint dots are the other settings, and the star is the best.

    Args:
      record: sweep.json.
      path: of the SVG file.

    Raises:
      UserError: when the record is damaged, or the file cannot be written.
    """
    rows, columns = _shape(record, COLUMNS)
    with new_figure(path, (3.1 * columns, 0.4 + 2.5 * rows)) as figure:
        _panels(figure, record, rows, columns)
        selected = one_line(str(record.get('selected_by', '')), 40 * columns)
        figure.suptitle(f'{selected}; star: the best setting', fontsize='small')


def sweep_in_page(record: Mapping[str, Any], path: Path) -> None:
    """Draws a sweep as `sweep` does, as a chart inside a page."""
    rows, columns = _shape(record, 2)
    with new_chart(path, 0.2 + 2.1 * rows) as figure:
        _panels(figure, record, rows, columns)


def _shape(record: Mapping[str, Any], most: int) -> tuple[int, int]:
    """Rows and columns of panels, at least one."""
    panels = max(1, min(PANELS, len(swept_flags(read_settings(record)[0]))))
    columns = min(most, panels)
    return math.ceil(panels / columns), columns


def _panels(figure: Any, record: Mapping[str, Any], rows: int, columns: int) -> None:
    flags_S, value_S, deviation_S, best = read_settings(record)
    panels = swept_flags(flags_S)[:PANELS]
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in grid[max(len(panels), 1) :]:
        axes.set_axis_off()
    for axes, flag in zip(grid, panels):
        _panel(axes, flag, flags_S, value_S, deviation_S, best)
    if not panels:  # of a single setting
        grid[0].plot([0], value_S[:1], '*', color=LINE_COLORS[1], ms=12)
        grid[0].set_xticks([])
        tidy(grid[0])
    for axes in grid[::columns]:
        axes.set_ylabel('validation')


def read_settings(
    record: Any,
) -> tuple[list[dict[str, str]], list[float], list[float], int]:
    """The settings of a sweep.json.

    Returns:
      For each setting its flags, the mean and the standard deviation over seeds (0 of one seed) of
      its validation metric; and the index of the best setting.

    Raises:
      UserError: when a part is missing or of another type.
    """
    try:
        settings = record['settings']
        flags_S = [{str(k): str(v) for k, v in one['flags'].items()} for one in settings]
        values = [[float(value) for value in one['validation']] for one in settings]
        best = [one['name'] for one in settings].index(record['best'])
        means = [statistics.fmean(of_seeds) for of_seeds in values]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        if not all(map(math.isfinite, means)):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, statistics.StatisticsError) as error:
        raise UserError('sweep.json is damaged; run the sweep again') from error
    return flags_S, means, deviations, best


def swept_flags(flags_S: Sequence[Mapping[str, str]]) -> list[str]:
    """The flags with several values, a setting without the flag counting as one."""
    names = dict.fromkeys(name for flags in flags_S for name in flags)
    return [name for name in names if len({flags.get(name) for flags in flags_S}) > 1]


def _panel(
    axes: Any,
    flag: str,
    flags_S: Sequence[Mapping[str, str]],
    value_S: Sequence[float],
    deviation_S: Sequence[float],
    best: int,
) -> None:
    """One flag: its values across, validation upwards."""
    texts_S = [flags.get(flag, NOT_GIVEN) for flags in flags_S]
    texts = _in_order(texts_S)
    places, log = _places(texts)
    at_S = np.array([places[text] for text in texts_S])
    others_S = [{k: v for k, v in flags.items() if k != flag} for flags in flags_S]
    joined = [s for s, others in enumerate(others_S) if others == others_S[best]]
    joined = sorted(joined, key=lambda s: at_S[s])
    rest = [s for s in range(len(at_S)) if s not in joined]
    value_S, deviation_S = np.array(value_S), np.array(deviation_S)
    axes.plot(at_S[rest], value_S[rest], 'o', color=GREY, ms=4)
    line = {'color': LINE_COLORS[0], 'lw': 1.2, 'ms': 4, 'capsize': 2}
    bars = deviation_S[joined] if deviation_S.any() else None
    axes.errorbar(at_S[joined], value_S[joined], yerr=bars, fmt='o-', **line)
    axes.plot(at_S[[best]], value_S[[best]], '*', color=LINE_COLORS[1], ms=12, zorder=3)
    if log:
        axes.set_xscale('log')
        axes.minorticks_off()
    shown = texts if len(texts) <= 8 else texts[:: math.ceil(len(texts) / 8)]
    turn = {'rotation': 30, 'ha': 'right', 'rotation_mode': 'anchor'}
    turn = turn if sum(len(one_line(text, 14)) for text in shown) > 26 else {}
    axes.set_xticks([places[text] for text in shown], [one_line(t, 14) for t in shown], **turn)
    if not log and not _are_numbers(texts):
        axes.set_xlim(-0.5, len(texts) - 0.5)
    axes.set_xlabel(one_line(f'--{flag}', 40))
    tidy(axes)


def _are_numbers(texts: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(text)) for text in texts)
    except ValueError:
        return False


def _in_order(texts: Sequence[str]) -> list[str]:
    """Each text once: numbers in ascending order, others as they come."""
    once = list(dict.fromkeys(texts))
    return sorted(once, key=float) if _are_numbers(once) else once


def _places(texts: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Where the values stand on the axis, and whether that is logarithmic.

    Numbers have their own places, a factor of 10 between positive ones a logarithmic axis; texts
    stand side by side.
    """
    if not _are_numbers(texts):
        return {text: float(place) for place, text in enumerate(texts)}, False
    numbers = [float(text) for text in texts]
    return dict(zip(texts, numbers)), min(numbers) > 0 and max(numbers) >= 10 * min(numbers)
