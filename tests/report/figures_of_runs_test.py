"""Drawings of several runs: the values that stand in them, and the panels of a sweep."""

import itertools
import warnings

import numpy as np
import pytest
from report_fixtures import ODD_NAMES, svg_texts

from fame_jax.errors import UserError
from fame_jax.report import figures, figures_of_runs
from fame_jax.screen import one_line


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def make_sweep(seeds=1, **values):
    """sweep.json of all combinations; validation is a sum over flags of the value's place."""
    settings = []
    for places in itertools.product(*(range(len(of_flag)) for of_flag in values.values())):
        flags = {name: of_flag[p] for (name, of_flag), p in zip(values.items(), places)}
        name = ','.join(f'{flag}={value}' for flag, value in flags.items())
        validation = [sum(places) + 0.5 * seed for seed in range(seeds)]
        settings.append({'name': name, 'flags': flags, 'validation': validation})
    settings = settings[::-1]
    return {'selected_by': 'validation', 'best': settings[0]['name'], 'settings': settings}


def panel(record, flag):
    """The axes of one panel."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figures_of_runs._panel(axes, flag, *figures_of_runs.read_settings(record))
    return axes


def points_of(line):
    return list(zip(line.get_xdata().tolist(), line.get_ydata().tolist()))


def test_a_panel_joins_the_settings_that_differ_from_the_best_in_this_flag_alone():
    """Rates 1e-4 and 1e-2 with three losses, the last of which is the best with both."""
    record = make_sweep(learning_rate=['1e-4', '0.01'], loss=['ce', 'bce', 'sampled'])
    others, joined, best = panel(record, 'learning_rate').lines
    assert points_of(joined) == [(1e-4, 2.0), (0.01, 3.0)]
    assert sorted(points_of(others)) == [(1e-4, 0.0), (1e-4, 1.0), (0.01, 1.0), (0.01, 2.0)]
    assert points_of(best) == [(0.01, 3.0)]
    axes = panel(record, 'learning_rate')
    assert axes.get_xscale() == 'log'
    assert [text.get_text() for text in axes.get_xticklabels()] == ['1e-4', '0.01']
    assert panel(record, 'loss').get_xscale() == 'linear'


def test_bars_are_the_deviation_over_seeds():
    record = make_sweep(seeds=3, dropout=['.3', '.4'])
    axes = panel(record, 'dropout')
    assert axes.get_xscale() == 'linear'
    segments = axes.collections[0].get_segments()
    assert np.ptp([y for _, y in segments[0]]) == pytest.approx(2 * np.std([0, 0.5, 1], ddof=1))
    assert points_of(axes.lines[-1]) == [(0.4, 1.5)]


def test_a_panel_for_each_flag_with_several_values(tmp_path):
    record = make_sweep(ema=['.9', '.99'], loss=['ce', 'bce'], width=['8'])
    record['settings'][0]['flags']['model'] = 'hstu'  # of a file of settings
    figures_of_runs.sweep(record, tmp_path / 'sweep.svg')
    texts = svg_texts(tmp_path / 'sweep.svg')
    assert {'--ema', '--loss', '--model', 'hstu', figures_of_runs.NOT_GIVEN} <= {*texts}
    assert '--width' not in texts
    assert figures.to_svg(figures_of_runs.sweep_in_page, record).count('<svg') == 1


@pytest.mark.parametrize(
    'values', [{'loss': ['ce']}, {'loss': ODD_NAMES}, {'a': map(str, range(30))}]
)
def test_any_sweep_can_be_drawn(tmp_path, values):
    record = make_sweep(**{name: list(texts) for name, texts in values.items()})
    figures_of_runs.sweep(record, tmp_path / 'sweep.svg')
    assert len(svg_texts(tmp_path / 'sweep.svg')) > 1
    many = make_sweep(**{f'flag{n}': ['1', '2'] if n < 2 else ['1'] for n in range(20)})
    many['settings'][0]['flags'] |= {f'more{n}': '1' for n in range(20)}
    figures_of_runs.sweep(many, tmp_path / 'many.svg')
    shown = [text for text in svg_texts(tmp_path / 'many.svg') if text.startswith('--')]
    assert len(shown) == figures_of_runs.PANELS


@pytest.mark.parametrize(
    'record',
    [
        *([], {}, {'settings': [], 'best': 'a'}, {'settings': [{'name': 'a'}], 'best': 'a'}),
        {'settings': [{'name': 'a', 'flags': {}, 'validation': []}], 'best': 'a'},
        {'settings': [{'name': 'a', 'flags': {}, 'validation': ['x']}], 'best': 'a'},
        {'settings': [{'name': 'a', 'flags': {}, 'validation': [1]}], 'best': 'b'},
        {'settings': [{'name': 'a', 'flags': {}, 'validation': [float('nan')]}], 'best': 'a'},
    ],
)
def test_a_damaged_record_is_one_line(record):
    with pytest.raises(UserError, match=r'sweep\.json is damaged'):
        figures_of_runs.read_settings(record)


@pytest.mark.parametrize('name', ODD_NAMES)
def test_names_of_runs_stand_in_the_legends(tmp_path, name):
    path = tmp_path / 'figure.svg'
    lines = {name: [[(0, 0.1), (1, 0.2)], [(0, 0.1), (1, 0.3)]], 'b': [[(0, 0.2)]]}
    figures_of_runs.curves(lines, {name: [1, None], 'b': [0]}, 'validation', path)
    assert [text for text in svg_texts(path) if text in (one_line(name, 44), 'b')] == [
        one_line(name, 44),
        'b',
    ]
    figures_of_runs.intervals({name: (0.1, -0.1, 0.3)}, 'minus b', path)
    assert {one_line(name, 28), 'minus b'} <= {*svg_texts(path)}
    points = {name: ([0.1, 0.2], [0.3, 0.4]), 'b': ([0.1], [0.2])}
    figures_of_runs.scatter(points, {'popularity': (0.0, 0.1)}, ('coverage', 'NDCG'), path)
    assert {one_line(name, 44), 'b', 'popularity', 'coverage', 'NDCG'} <= {*svg_texts(path)}
