"""Figures are whole SVG files that contain the given numbers and names, whatever they are."""

import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from report_fixtures import ODD_NAMES, make_agreement, make_explanation, svg_texts

from fame_jax.errors import UserError
from fame_jax.report import figures
from fame_jax.screen import one_line


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def test_heads_by_facets_contains_every_number_of_every_stage(tmp_path):
    stages = {name: make_agreement(seed=s) for s, name in enumerate(['text before', 'after'])}
    figures.heads_by_facets(stages, tmp_path / 'heads.svg')
    texts = svg_texts(tmp_path / 'heads.svg')
    for name, of_stage in stages.items():
        assert texts.count(name) == 1
        for key in figures.AGREEMENT:
            for value in [v for row in [*of_stage[key], of_stage['whole'][key]] for v in row]:
                assert f'{value:.2f}'.replace('-0.00', '0.00').replace('0.', '.') in texts
    for word, times in {'head 1': 2, 'head 3': 2, 'head 4': 0, 'all': 2, 'brand': 2}.items():
        assert texts.count(word) == times


@pytest.mark.parametrize(
    ('value', 'text'),
    [(0, '.00'), (-0.001, '.00'), (0.125, '.12'), (-0.05, '-.05'), (0.996, '1.00'), (-1, '-1.00')],
)
def test_numbers_are_short(value, text):
    assert figures._short(value) == text


def test_all_matrices_share_one_scale():
    """A value has one colour, whatever the other values of its matrix are."""
    from matplotlib.figure import Figure

    colors = []
    for others in (0.1, 0.9):
        agreement = make_agreement(heads=1, facets=('f',))
        agreement |= {'probe': [[0.3]], 'whole': {'probe': [others]}}
        axes = Figure().subplots()
        figures._agreement(axes, agreement, 'probe')
        mesh = axes.collections[0]
        mesh.update_scalarmappable()
        colors.append(mesh.to_rgba(mesh.get_array()).tolist())
    assert colors[0] == colors[1]


def test_odd_names_break_nothing(tmp_path):
    heads, items = tmp_path / 'heads.svg', tmp_path / 'items.svg'
    figures.heads_by_facets({name: make_agreement(2, ODD_NAMES) for name in ODD_NAMES[:2]}, heads)
    xy = np.random.default_rng(0).normal(size=(40, 2))
    figures.item_map(xy, {name: ODD_NAMES[:8] * 5 for name in ODD_NAMES}, items)
    for path, most in ((heads, 24), (items, 26)):
        assert {one_line(name, most) for name in ODD_NAMES[:8]} <= set(svg_texts(path))


def test_the_eight_most_frequent_labels_are_named(tmp_path):
    labels = [f'label {n}' for n in range(1, 11) for _ in range(n)]  # label n occurs n times
    xy = np.random.default_rng(0).normal(size=(len(labels) + 20, 2))
    panels = {'few': [*labels, None, *[''] * 19], 'none': [None] * len(xy)}
    figures.item_map(xy, panels, tmp_path / 'a.svg')
    texts = svg_texts(tmp_path / 'a.svg')
    assert [text for text in texts if text.startswith('label')] == [
        f'label {n}' for n in range(10, 2, -1)
    ]
    assert texts.count('other or none') == 2 and {'few', 'none'} <= set(texts)


def test_an_item_with_several_labels_is_drawn_as_the_rarest():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    labels = [['toys'], ['toys', 'games'], ['games', 'toys'], ['toys', 'dolls'], []]
    figures._scatter(axes, np.arange(10).reshape(5, 2), labels)
    drawn = [points.get_offsets()[:, 0].tolist() for points in axes.collections]
    assert drawn == [[8], [0], [2, 4], [6]]  # others, toys, games, dolls; by x


def test_thousands_of_items_make_a_small_file(tmp_path):
    xy = np.random.default_rng(0).normal(size=(3000, 2))
    figures.item_map(xy, {'facet': ['a', 'b', 'c'] * 1000}, tmp_path / 'a.svg')
    assert (tmp_path / 'a.svg').stat().st_size < 300_000


def test_equal_figures_are_equal_bytes_and_leave_matplotlib_unchanged(tmp_path):
    before = {key: matplotlib.rcParams[key] for key in figures.STYLE}
    for name in ('a', 'b'):
        figures.heads_by_facets({'text': make_agreement()}, tmp_path / name)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()
    assert before == {key: matplotlib.rcParams[key] for key in figures.STYLE} != figures.STYLE


def test_a_figure_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a.svg'
    path.write_text('old')
    with pytest.raises(ValueError):
        figures.heads_by_facets({'text': make_agreement() | {'probe': 'no numbers'}}, path)
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.svg']
    with pytest.raises(UserError, match=r'writing .*a\.svg'):
        figures.heads_by_facets({'text': make_agreement()}, tmp_path / 'missing' / 'a.svg')


def test_importing_the_report_imports_neither_jax_nor_matplotlib():
    code = (
        'import sys, fame_jax.report.html, fame_jax.report.terminal\n'
        "print({'matplotlib', 'jax'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == 'set()'


def test_an_explanation_shows_history_gates_and_every_list(tmp_path):
    figures.explanation(make_explanation(), tmp_path / 'a.svg')
    texts = svg_texts(tmp_path / 'a.svg')
    names = ['one', 'two', 'three', 'four', 'five']
    assert [text for text in texts if text in names] == names[:4]  # the history, in order
    assert 'FAME <1>. Next item: three, rank 3' in texts
    assert {'head 1, gate 50%', 'head 2, gate 50%', 'router', 'attention'} <= set(texts)
    assert [texts.count(f'{n}') for n in (1, 2, 3, 4)] == [2, 2, 2, 0]  # experts of both heads
    entries = [text.replace('  ', ' ') for text in texts]
    assert [entries.count(text) for text in ('1 one', '1 five', '3 three')] == [2, 2, 4]
    assert (tmp_path / 'a.svg').read_text().count('#fbe3a1') == 4  # the target, in each list


def test_an_explanation_without_heads_shows_the_change_without_each_item(tmp_path):
    explained = make_explanation(heads=0, length=2)
    explained['recommended'][0]['without'] = [-1.23, 0.0041]
    figures.explanation(explained, tmp_path / 'a.svg')
    assert {'-1.2', '+0.0041', 'one', 'two'} <= set(svg_texts(tmp_path / 'a.svg'))


@pytest.mark.parametrize(
    'size',
    [
        {'heads': 1, 'experts': 1, 'length': 1},
        {'heads': 6, 'experts': 16, 'length': 70},
        {'heads': 0, 'length': 1},
        {'heads': 0, 'length': 70},
    ],
)
def test_explanations_of_all_sizes_can_be_drawn(tmp_path, size):
    explained = make_explanation(**size, names=ODD_NAMES)
    explained['target'] = None if size['length'] == 1 else explained['target'] | {'rank': None}
    figures.explanation(explained, tmp_path / 'a.svg')
    assert svg_texts(tmp_path / 'a.svg').count(one_line(ODD_NAMES[0], 46)) <= 5  # of 7
