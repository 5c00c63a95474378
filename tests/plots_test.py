"""Pictures are whole files that say what they were given, whatever it is called."""

import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fame_jax import plots
from fame_jax.errors import UserError

ODD = [
    '$x_1$',
    '$\\frac{',
    '<b>&amp;',
    '_hidden',
    'שלום עולם',
    'a name that is much longer than any picture has room for',
    '電子玩具',
    '%s {0} \\n #',
]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def comparison(facets=('brand', 'category'), heads=3, seed=0):
    """What probe.compare returns, of made-up figures that are all different."""
    rng = np.random.default_rng(seed)
    figures = {key: rng.uniform(-0.1, 1, (heads, len(facets))).tolist() for key in plots.FIGURES}
    return {
        'facets': list(facets),
        **figures,
        'silhouette': [[None] * len(facets)] * heads,
        'whole': {key: rng.uniform(0, 1, len(facets)).tolist() for key in plots.FIGURES},
        'matching': [[m, m] for m in range(min(heads, len(facets)))],
        'matched': 0.5,
        'unmatched': None,
    }


def texts(path):
    """All texts of an SVG, which must be XML."""
    found = ET.parse(path).iter('{http://www.w3.org/2000/svg}text')
    return [''.join(element.itertext()) for element in found]


def written(value):
    return f'{value:.2f}'.replace('-0.00', '0.00').replace('0.', '.')


def test_every_figure_of_every_stage_is_in_the_matrices(tmp_path):
    stages = {name: comparison(seed=s) for s, name in enumerate(['text before', 'text after'])}
    plots.heads_by_facets(stages, tmp_path / 'heads.svg')
    found = texts(tmp_path / 'heads.svg')
    for name, of_stage in stages.items():
        assert found.count(name) == 1
        for key in plots.FIGURES:
            for value in [v for row in [*of_stage[key], of_stage['whole'][key]] for v in row]:
                assert written(value) in found
    for word, times in {'head 1': 2, 'head 3': 2, 'head 4': 0, 'all': 2, 'brand': 2}.items():
        assert found.count(word) == times
    assert {*plots.FIGURES.values()} <= set(found)
    assert [p.name for p in tmp_path.iterdir()] == ['heads.svg']


@pytest.mark.parametrize(
    ('value', 'text'),
    [(0, '.00'), (-0.001, '.00'), (0.125, '.12'), (-0.05, '-.05'), (0.996, '1.00'), (-1, '-1.00')],
)
def test_numbers_are_short(value, text):
    assert plots._number(value) == text


def test_shades_mean_the_same_in_all_matrices(tmp_path):
    """A figure has one colour, whatever others stand beside it."""
    low, high = comparison(('f',), 1), comparison(('f',), 1)
    for found, others in ((low, 0.1), (high, 0.9)):
        found |= {'neighbours': [[0.3]], 'probe': [[0.6]]}
        found['whole'] = {'neighbours': [others], 'probe': [others]}
    plots.heads_by_facets({'low': low, 'high': high}, tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
        colors = {c: n for n, c in image.convert('RGB').getcolors(1 << 24)}
    shade = matplotlib.colormaps[plots.SHADES]
    cell = [
        colors.get(tuple((255 * np.array(shade(v)[:3])).round().astype(int)), 0)
        for v in (0.3, 0.6, 0.1, 0.9, 0.45)
    ]
    assert min(cell[:4]) > 1000 and cell[4] < 50
    assert cell[0] == pytest.approx(cell[1], rel=0.2)


@pytest.mark.parametrize('suffix', ['svg', 'png', 'PNG'])
def test_odd_names_break_nothing(tmp_path, suffix):
    heads, items = tmp_path / f'heads.{suffix}', tmp_path / f'items.{suffix}'
    plots.heads_by_facets({name: comparison(ODD, 2) for name in ODD[:2]}, heads)
    xy = np.random.default_rng(0).normal(size=(80, 2))
    plots.item_map(xy, {name: ODD * 10 for name in ODD[:4]}, items)
    for path in (heads, items):
        if suffix == 'svg':
            found = texts(path)
            for name in ODD:
                assert plots.plain(name, 24) in found or plots.plain(name, 26) in found
        else:
            with Image.open(path) as image:
                image.load()
                assert image.format == 'PNG' and min(image.size) > 400


def test_names_are_cut_to_one_line_of_letters():
    assert plots.plain('a\n b\t\x00c\u202e', 9) == 'a b c'
    assert plots.plain('abcdef', 6) == 'abcdef'
    assert plots.plain('abcdefg', 6) == 'abcde…'
    assert plots.plain('abcd fg', 6) == 'abcd…'
    assert plots.plain('\ud800', 6) == ''  # half a letter, which no file takes


def test_the_eight_commonest_labels_are_named(tmp_path):
    """Label n stands n times, from 1 to 10."""
    labels = [f'label {n}' for n in range(1, 11) for _ in range(n)]
    xy = np.random.default_rng(0).normal(size=(len(labels) + 20, 2))
    plots.item_map(
        xy, {'few': [*labels, None, *[''] * 19], 'none': [None] * len(xy)}, tmp_path / 'a.svg'
    )
    found = texts(tmp_path / 'a.svg')
    named = [text for text in found if text.startswith('label')]
    assert named == [f'label {n}' for n in range(10, 2, -1)]
    assert found.count('other or none') == 2 and {'few', 'none'} <= set(found)


def test_an_item_of_several_labels_is_drawn_as_the_rarest(tmp_path, monkeypatch):
    """'toys' is everybody's; were it drawn, nobody would be anything else."""
    axes, drawn = Axes(), []
    monkeypatch.setattr(axes, 'scatter', lambda x, y, **_: drawn.append(sorted(x)))
    names = [['toys'], ['toys', 'games'], ['games', 'toys'], ['toys', 'dolls'], []]
    plots._scatter(axes, np.arange(10).reshape(5, 2), names)
    assert drawn == [[8], [0], [2, 4], [6]]  # others, toys, games, dolls; by x


class Axes:
    """As much of matplotlib's as a panel needs."""

    def set_aspect(self, *_, **__):
        pass

    def legend(self, *_, **__):
        return type('Legend', (), {'legend_handles': []})

    def scatter(self, *_, **__):
        raise NotImplementedError


def test_thousands_of_items_make_a_small_file(tmp_path):
    xy = np.random.default_rng(0).normal(size=(3000, 2))
    plots.item_map(xy, {'facet': ['a', 'b', 'c'] * 1000}, tmp_path / 'a.svg')
    assert (tmp_path / 'a.svg').stat().st_size < 300_000


def test_the_same_figures_make_the_same_bytes(tmp_path):
    for name in ('a', 'b'):
        for suffix in ('svg', 'png'):
            plots.heads_by_facets({'text': comparison()}, tmp_path / f'{name}.{suffix}')
    for suffix in ('svg', 'png'):
        first, second = ((tmp_path / f'{name}.{suffix}').read_bytes() for name in 'ab')
        assert first == second


def test_the_caller_s_matplotlib_is_left_as_it_was(tmp_path):
    before = {key: matplotlib.rcParams[key] for key in plots.STYLE}
    plots.heads_by_facets({'text': comparison()}, tmp_path / 'a.svg')
    assert before == {key: matplotlib.rcParams[key] for key in plots.STYLE} != plots.STYLE
    assert 'matplotlib.pyplot' not in sys.modules


@pytest.mark.parametrize('name', ['a.pdf', 'a', 'svg', 'a.svg.gz'])
def test_another_suffix_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(UserError) as error:
        plots.heads_by_facets({'text': comparison()}, tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and '.svg or .png' in str(error.value)
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told_of(tmp_path):
    with pytest.raises(UserError, match=r'writing .*a\.svg'):
        plots.heads_by_facets({'text': comparison()}, tmp_path / 'missing' / 'a.svg')


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / 'a.svg'
    path.write_text('old')
    broken = comparison() | {'probe': 'no figures'}
    with pytest.raises(ValueError):
        plots.heads_by_facets({'text': broken}, path)
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.svg']


def test_who_does_not_draw_waits_for_no_matplotlib():
    code = "import sys, fame_jax.plots; print({'matplotlib', 'jax'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == 'set()'


def explained(heads=2, experts=3, length=4, names=ODD):
    """What explain.explain returns, of made-up figures."""
    rng = np.random.default_rng(0)
    name = (list(names) * 9).__getitem__
    items = [{'item': str(n), 'title': name(n), 'score': 9.0 - n} for n in range(5)]
    found = {
        'model': 'FAME <1>',
        'history': [{'item': f'h{n}', 'title': name(n)} for n in range(length)],
        'recommended': [
            item | {'without': rng.normal(size=length).tolist() if length > 1 else None}
            for item in items
        ],
        'target': items[2] | {'rank': 3},
    }
    if heads:
        attention_HNL = rng.dirichlet(np.ones(length), (heads, experts))
        found['heads'] = [
            {
                'gate': 1.0,
                'share': 1 / heads,
                'top': items[::-1],
                'router': rng.dirichlet(np.ones(experts)).tolist(),
                'attention': attention_NL.tolist(),
            }
            for attention_NL in attention_HNL
        ]
        found |= {'equal_gates': items, 'carried': rng.dirichlet(np.ones(length)).tolist()}
    return found


def test_an_explanation_shows_the_history_the_gate_and_every_list(tmp_path):
    names = ['first toy', 'second', 'third', 'fourth', 'fifth']
    plots.explanation(explained(names=names), tmp_path / 'a.svg')
    found = texts(tmp_path / 'a.svg')
    assert [name for name in found if name in names] == names[:4]  # the history, in order
    assert 'FAME <1>. Next came third: rank 3' in found
    assert {'head 1, gate 50%', 'head 2, gate 50%', "router's weights", 'attended'} <= set(found)
    assert [found.count(f'{n}') for n in (1, 2, 3, 4)] == [2, 2, 2, 0]  # experts of both heads
    lists = [name for name in found if name in ('recommended', 'head 1: 50%', 'equal gates')]
    assert lists == ['recommended', 'head 1: 50%', 'equal gates']
    entries = [name.replace('  ', ' ') for name in found]
    assert entries.count('1 first toy') == 2 and entries.count('1 fifth') == 2
    assert entries.count('3 third') == 4
    assert (tmp_path / 'a.svg').read_text().count('#fbe3a1') == 4  # the target, in each list


def test_an_explanation_without_heads_shows_what_each_item_was_worth(tmp_path):
    found = explained(heads=0, length=2, names=['x', 'y', 'z'])
    found['recommended'][0]['without'] = [-1.23, 0.04]
    plots.explanation(found, tmp_path / 'a.svg')
    drawn = texts(tmp_path / 'a.svg')
    assert {'-1.2', '+0.0'} <= set(drawn) and '-0.0' not in drawn
    assert (
        drawn.count('x') == 1 and 'how the score changes without the item of the history' in drawn
    )


@pytest.mark.parametrize('suffix', ['svg', 'png'])
@pytest.mark.parametrize(
    'about',
    [
        {'heads': 1, 'experts': 1, 'length': 1},
        {'heads': 6, 'experts': 16, 'length': 70},
        {'heads': 0, 'length': 1},
        {'heads': 0, 'length': 70},
    ],
)
def test_explanations_of_all_sizes_can_be_drawn(tmp_path, suffix, about):
    found = explained(**about)
    found['target'] = None if about['length'] == 1 else found['target'] | {'rank': None}
    plots.explanation(found, tmp_path / f'a.{suffix}')
    if suffix == 'png':
        with Image.open(tmp_path / 'a.png') as image:
            assert image.size[0] == 2400
    else:
        drawn = texts(tmp_path / 'a.svg')
        told = plots.plain(ODD[0], 46)
        assert sum(told == text for text in drawn) <= 12
        assert ('nothing to leave out' in ' '.join(drawn)) == (about == {'heads': 0, 'length': 1})
        assert ('may not be recommended' in ' '.join(drawn)) == (about['length'] > 1)
