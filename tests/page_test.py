"""The page is one whole file, whatever the names in it; figures keep their ids to themselves."""

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fame_jax import charts, facts, markup, plots
from fame_jax.page import page

ODD = [
    '<script>alert(1)</script>',
    '"quoted\' & <b>bold</b>',
    'שלום עולם',
    '</title></style><img src=x onerror=alert(1)>',
    'a\nline\x00 \u202ebreak',
    '\ud800 half a letter',
]
VOID = {'meta', 'br', 'img', 'link', 'hr', 'input'}


class Reader(HTMLParser):
    """Elements, texts and attributes, and every tag that is not closed where it should be."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.tags, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def entry(name, **more):
    return {'item': f'id {name}', 'title': name, 'score': 1.5, **more}


def explained(name='toy', heads=2):
    """What `explain` returns, of two items in the history."""
    found = {
        'model': 'FAME',
        'history': [{'item': '1', 'title': name}, {'item': '<2>', 'title': ''}],
        'unknown': [],
        'too_old': 0,
        'fallback': '',
        'recommended': [entry(name, without=[-0.25, 0.5]), entry('other', without=[0.0, -1.0])],
        'target': entry(name, rank=1),
    }
    if heads:
        one = {'gate': 1.0, 'share': 1 / heads, 'top': [entry('other'), entry(name)]}
        one |= {'router': [0.9, 0.1], 'attention': [[0.2, 0.8], [1.0, 0.0]]}
        found |= {'heads': [one] * heads, 'equal_gates': [entry('other'), entry('third')]}
        found |= {'carried': [0.4, 0.6], 'identity': 1e-7}
    return found


def metrics(value):
    names = [f'{name}@{k}' for name in ('hr', 'ndcg') for k in (5, 10, 20)]
    return dict.fromkeys([*names, 'mrr'], value)


def both(value):
    return {'masked': metrics(value), 'unmasked': metrics(value / 2)}


def least(name='GRU4Rec', dataset='toys'):
    """A baseline that left nothing but its results."""
    return {
        'final': 'pretrain',
        'names': {'popularity': 'popularity', 'pretrain': name},
        'card': {
            'dataset': {'name': dataset, 'users': 1234, 'items': 56},
            'split': 'leave one out',
            'config': {'secret': 'of flags.cfg'},
        },
        'results': {
            'popularity': {'model': 'popularity', 'test': both(0.01)},
            'pretrain': {'model': name, 'test': both(0.0567)},
        },
        'paper': {},
        'curves': [],
        'groups': [],
        'heads': None,
        'facets': '',
        'items': '',
        'cases': [],
        'titles': False,
        'flags': '',
        'code': '1.2.3',
    }


def whole(name='FAME'):
    """A FAME with everything, one name everywhere."""
    found = least(name, name)
    found['final'] = 'finetune'
    found['names'] |= {'finetune': name}
    found['results'] |= {'finetune': {'model': name, 'test': both(0.07)}}
    found['paper'] = {'finetune': (name, {'hr@10': 0.1065}, [name])}
    lines = {f'loss {name}': [(1, 3.0), (2, 2.0)], 'validation NDCG@20': [(0, 0.01), (2, 0.05)]}
    drawn = charts.svg(charts.curves, lines, 2)
    found['curves'] = [{'stage': stage, 'about': name, 'svg': drawn} for stage in found['names']]
    rank_U = np.array([1, 20, 3])
    ranks = {stage: {'masked': rank_U, 'unmasked': rank_U + 1} for stage in found['names']}
    rows = facts.judge_groups(facts.by_quantile(np.array([3, 4, 5])), ranks)
    drawn = charts.svg(charts.groups, rows, found['names'])
    found['groups'] = [{'by': by, 'rows': rows, 'svg': drawn} for by in ('length', 'popularity')]
    use = facts.use(np.array([[0.4, 0.6], [0.7, 0.3]]), np.full((2, 2, 3), 1 / 3))
    found['heads'] = use | {'svg': charts.svg(charts.gates, use['heads'], use['edges'])}
    found['facets'] = found['items'] = found['groups'][0]['svg']
    found['cases'] = [{'rule': 'the rule', 'user': name, 'found': explained(name)}]
    found |= {'titles': True, 'flags': f'--dataset={name}\n'}
    return found


def sections(source):
    return re.findall('<section id="([a-z]+)">', source)


@pytest.fixture(scope='module')
def full():
    return page(whole())


def test_what_is_not_there_is_left_out(full):
    assert sections(page(least())) == ['metrics', 'protocol']
    everything = ['metrics', 'curves', 'groups', 'heads', 'facets', 'cases', 'protocol', 'again']
    assert sections(full) == everything
    assert re.findall('<a href="#([a-z]+)">', full) == everything


def test_the_summary_tells_the_figures_and_what_they_are_worth(full):
    told = ''.join(Reader(full).texts)
    assert 'HR@10 is .0700 and NDCG@10 .0700; unmasked, .0350 and .0350.' in told
    assert 'each of 1,234 users is to be found among all 56' in told
    assert 'NDCG@10 is 7 times that.' in told
    assert 'from .0567 to .0700 (+23.5 %) masked and from .0284 to .0350 (+23.5 %)' in told
    nothing = least()
    nothing['results']['popularity']['test'] = both(0.0)
    told = ''.join(Reader(page(nothing)).texts)
    assert 'Popularity has .0000 and .0000, masked.' in told and 'backbone' not in told


def test_it_stands_alone(full):
    reader = Reader(full)
    assert reader.faults == []
    assert not {'script', 'link', 'iframe', 'object', 'form'} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not any(name.startswith('on') for name in attributes), (tag, attributes)
        for name in ('src', 'href', 'action', 'xlink:href'):
            assert re.match('#|data:image/svg', attributes.get(name) or '#'), (tag, attributes)
    assert '@import' not in full and not re.search(r'url\((?!#)', full)
    assert "default-src 'none'" in full and 'prefers-color-scheme: dark' in full
    assert 'width=device-width' in full


@pytest.mark.parametrize('name', ODD)
def test_odd_names_are_text(name):
    source = page(whole(name))
    reader = Reader(source)
    assert reader.faults == []
    assert 'script' not in {tag for tag, _ in reader.tags}
    assert [a['alt'] for tag, a in reader.tags if tag == 'img'] == [
        'The items in the plane, coloured by label.'
    ]
    shown = markup.plain(name, 120)
    assert shown in reader.texts and '\x00' not in source and '\u202e' not in source
    assert f'<bdi>{markup.html.escape(shown)}</bdi>' in source
    source.encode('utf-8')


def test_ids_are_one_of_a_kind_and_all_that_is_pointed_to_is_there(full):
    reader = Reader(full)
    ids = [attributes['id'] for _, attributes in reader.tags if 'id' in attributes]
    assert len(ids) == len(set(ids)) > 50
    pointed = set(re.findall(r'url\(#([^)]*)\)', full))
    pointed |= {a['href'][1:] for _, a in reader.tags if a.get('href', '').startswith('#')}
    assert pointed <= set(ids) and any(name.startswith('gates-') for name in pointed)


def test_figures_are_drawn_in_the_pages_ink_and_have_names():
    svg = whole()['curves'][0]['svg']
    assert 'currentColor' in svg and charts.INK not in svg and '#000000' not in svg.lower()
    found = markup.figure(svg, 'a', 'Tall & <thin>')
    assert found.startswith('<figure><svg ') and '<?xml' not in found and 'DOCTYPE' not in found
    assert 'metadata' not in found and 'viewBox' in found
    assert 'aria-label="Tall &amp; &lt;thin&gt;"' in found
    assert '<title>Tall &amp; &lt;thin&gt;</title>' in found and 'role="img"' in found


def test_an_image_is_closed_in():
    found = markup.picture('<svg onload="alert(1)"/>', 'a "map"')
    assert 'onload' not in found and 'alt="a &quot;map&quot;"' in found


def test_the_target_is_marked_wherever_it_stands(full):
    cases = full[full.index('<section id="cases">') : full.index('<section id="protocol">')]
    lists = cases[cases.index('all together') : cases.index('history, the latest')]
    marked = re.findall('<mark><bdi>(.*?)</bdi></mark>', lists)
    assert marked == ['FAME'] * 3  # first of all together, second of both heads
    for name in ('head 1: 50 %', 'head 2: 50 %', 'equal gates', '<bdi>third</bdi>'):
        assert name in lists


def test_a_history_is_shown_from_the_latest_with_what_each_item_did():
    found = explained()
    source = page(whole() | {'cases': [{'rule': 'r', 'user': 'u', 'found': found}]})
    rows = source[source.index('history, the latest') :]
    first, second = (rows.index(text) for text in ('&lt;2&gt;', '<bdi>toy</bdi>'))
    assert first < second
    # The last router weighs the experts .9 and .1: .9 * .2 + .1 * 1 of the first item.
    assert rows.count('>28 %<') == rows.count('>72 %<') == 2 and '>40 %<' in rows
    assert '>+0.50<' in rows and '>-0.25<' in rows


def test_a_long_history_is_cut():
    found = explained()
    found['history'] = [{'item': f'no. {n}', 'title': ''} for n in range(25)]
    found['recommended'][0]['without'] = [0.0] * 25
    found = {k: v for k, v in found.items() if k not in ('heads', 'equal_gates', 'carried')}
    found['too_old'] = 3
    source = page(least() | {'cases': [{'rule': 'r', 'user': 'u', 'found': found}]})
    assert 'no. 24' in source and '>no. 5<' in source and '>no. 4<' not in source
    assert '8 before them are left out.' in source


def test_a_user_with_one_item_and_a_target_that_may_not_be_recommended():
    found = explained(heads=0)
    found['history'] = found['history'][:1]
    for one in found['recommended']:
        one['without'] = None
    found['target']['rank'] = None
    source = page(least() | {'cases': [{'rule': 'r', 'user': 'u', 'found': found}]})
    assert 'may not be recommended again' in source and 'no. 1 without it' not in source


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({}, 'All 2 heads are used. All 6 experts are used. Dead is a head with a mean share'),
        ({'dead_heads': [1]}, '1 of 2 heads is dead: head 2.'),
        (
            {'dead_experts': [[0, 2], [1, 0]]},
            '2 of 6 experts are dead: expert 3 of head 1, expert 1 of head 2.',
        ),
        ({'entropy': 0.2}, 'the gate chooses (entropy 0.200 of the maximum)'),
        ({'entropy': 0.7}, 'the gate leans'),
        ({'entropy': 0.97}, 'the gate mixes almost evenly'),
        ({}, 'the routers mix almost evenly (entropy 1.000'),
    ],
)
def test_the_verdict_on_heads_and_experts(changes, told):
    found = whole()
    verdict = ''.join(Reader(page(found | {'heads': found['heads'] | changes})).texts)
    assert told in verdict
    assert 'under 5 %' in verdict and 'under 3.33 %' in verdict


def test_the_papers_figures_stand_beside_ours(full):
    rows = re.findall('<tr class="printed">.*?</tr>', full)
    assert len(rows) == 2 and all('.1065' in row and '[1]' in row for row in rows)
    assert 'does not tell' in full and 'does not tell' not in page(least())


def test_numbers_are_short():
    assert [markup.percent(x) for x in (0, 0.004, 0.0994, 0.0996, 1)] == [
        *('0 %', '0.4 %', '9.9 %', '10 %', '100 %')
    ]
    assert [markup.short(x) for x in (None, 0.5, 1.0)] == ['', '.5000', '1.0000']


def test_the_config_is_told_once():
    source = page(least() | {'flags': '--secret=<of flags.cfg>\n'})
    assert source.count('secret') == 1 and '&lt;of flags.cfg&gt;' in source
    assert 'python -m fame_jax.main --flagfile=flags.cfg' in source
    assert 'fame_jax <bdi>1.2.3</bdi>' in source


def test_a_light_figure_is_made_by_the_same_hand(tmp_path):
    """heads_by_facets knows nothing of the page's ink."""
    found = {key: np.full((2, 1), 0.5).tolist() for key in plots.FIGURES}
    found |= {'facets': ['<b>'], 'whole': {key: [0.5] for key in found}, 'matching': []}
    source = page(least() | {'facets': charts.svg(plots.heads_by_facets, {'fine-tuned': found})})
    assert '<figure class="light"><svg' in source and '&lt;b&gt;' in source
    assert Reader(source).faults == []


def test_the_style_is_part_of_the_package():
    assert 'page.css' in (Path(__file__).parent.parent / 'pyproject.toml').read_text()


def test_facts_are_not_changed():
    found = whole()
    before = copy.deepcopy(found)
    page(found)
    assert found == before
