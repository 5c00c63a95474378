"""The page is one self-contained file with all numbers, whatever the names in it."""

import copy
import dataclasses
import re

import numpy as np
import pytest
from fixtures import Reader, sections
from report_fixtures import (
    CARD,
    ODD_NAMES,
    full_report,
    make_explanation,
    make_results,
    smallest_report,
)

from fame_jax.evaluation import lists
from fame_jax.report import figures, html
from fame_jax.report.collect import Case
from fame_jax.screen import one_line

ALL = ['metrics', 'curves', 'groups', 'heads', 'facets', 'cases', 'protocol', 'flags']


@pytest.fixture(scope='module')
def full():
    return html.page(full_report())


def section(source, name):
    return source[source.index(f'<section id="{name}">') :].split('</section>')[0]


def cells(source):
    """The rows of all tables, as lists of texts."""
    return [
        [re.sub('<[^>]*>', '', cell) for cell in re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row)]
        for row in re.findall('<tr.*?>(.*?)</tr>', source)
    ]


def page_of(explained):
    return html.page(smallest_report(cases=[Case('a rule', 'u', explained)]))


def test_sections_without_content_are_left_out(full):
    assert sections(full) == ALL == re.findall('<a href="#([a-z]+)">', full)
    assert sections(html.page(smallest_report())) == ['metrics', 'protocol']


def test_the_table_has_every_model_under_both_protocols(full):
    rows = cells(section(full, 'metrics'))
    assert [(row[0], row[5]) for row in rows] == [
        ('Masked', 'NDCG@10'),
        *[('FAME', '.0100'), ('FAME', '.0567'), ('FAME', '.0700'), ('FAME in the paper [1]', '')],
        ('Unmasked', 'NDCG@10'),
        *[('FAME', '.0050'), ('FAME', '.0284'), ('FAME', '.0350'), ('FAME in the paper [1]', '')],
    ]
    assert all(len({*row[1:]}) == 1 for row in rows if row[0] == 'FAME')


def test_the_papers_results_are_below_the_model_in_both_protocols(full):
    rows = re.findall('<tr class="paper">.*?</tr>', full)
    assert len(rows) == 2 and all('.1065' in row and '[1]' in row for row in rows)
    assert 'tr class="paper"' not in html.page(smallest_report())


def test_the_summary_has_the_main_results(full):
    summary = ''.join(Reader(full[: full.index('<nav')]).texts)
    for value in ('1,234', '56', '.0700', '.0350', '.0100', '.0567'):
        assert value in summary
    results = smallest_report().results
    results['pretrain']['test']['masked']['ndcg@10'] = 0.0
    assert '.0000' in html.page(smallest_report(results=results))


def summary_of(run):
    source = html.page(run)
    header = source[source.index('<header>') : source.index('<nav')]
    return ' '.join(re.sub('<[^>]*>', '', header).split())


def with_ranks(backbone_U, tuned_U):
    """A FAME whose stages have these masked ranks; unmasked they are 1 larger."""
    ranks = {
        stage: {'masked': rank_U, 'unmasked': rank_U + 1}
        for stage, rank_U in (('pretrain', backbone_U), ('finetune', tuned_U))
    }
    return dataclasses.replace(full_report(), ranks=ranks, groupings=())


def test_the_gain_of_fine_tuning_has_its_interval():
    """Of 100 users with the target at rank 1, 50 had it at 3: every resample has a gain."""
    backbone_U = np.where(np.arange(100) < 50, 3, 1)
    summary = summary_of(with_ranks(backbone_U, np.ones(100, int)))
    # NDCG 1 instead of .75: + 1 / 3; the interval of .25 is about 1.96 * .25 / 10 to each side.
    found = re.search(
        r'\(\+\.2500, 95 % interval over users \+(\.\d+) to \+(\.\d+); '
        r'\+33\.3 %, interval \+(\S+) % to \+(\S+) %\)',
        summary,
    )
    low, high, low_share, high_share = map(float, found.groups())
    assert [low, high] == pytest.approx([0.25 - 0.049, 0.25 + 0.049], abs=0.01)
    assert [low_share, high_share] == pytest.approx([low / 0.0075, high / 0.0075], abs=0.1)
    assert 'chance' not in summary


def test_a_gain_that_can_be_chance_is_called_so():
    backbone_U = np.array([1, 3] * 20)
    summary = summary_of(with_ranks(backbone_U, np.roll(backbone_U, 1)))
    assert '(+.0000, 95 % interval over users -.' in summary
    assert 'a difference of this size can be chance' in summary


def test_a_model_without_fine_tuning_has_its_gain_over_the_best_baseline():
    results = make_results(popularity=0.01, item_graph=0.0234, pretrain=0.0567)
    ranks = {'popularity': np.full(9, 50), 'item_graph': np.full(9, 3), 'pretrain': np.ones(9, int)}
    ranks = {name: {'masked': rank_U, 'unmasked': rank_U} for name, rank_U in ranks.items()}
    summary = summary_of(smallest_report(results=results, ranks=ranks))
    words = 'Masked NDCG@10 is .0567, and .0234 of ITEM_GRAPH, which is not trained (+.5000, 95 %'
    assert words in summary
    assert 'not trained' not in summary_of(smallest_report(results=results))


def test_no_percentage_without_its_interval():
    summary = summary_of(dataclasses.replace(full_report(), ranks={}, groupings=()))
    assert '.0567' in summary and '.0700.' in summary and '%' not in summary


def test_a_backbone_without_a_hit_has_no_percentage_of_gain():
    summary = summary_of(with_ranks(np.full(9, 50), np.ones(9, int)))
    assert '(+1.0000, 95 % interval over users +1.0000 to +1.0000)' in summary


def test_the_selected_ranking_is_the_main_one():
    card = CARD | {'select_on': 'unmasked', 'repeats': {'validation': 0.7, 'test': 0.75}}
    run = dataclasses.replace(with_ranks(np.full(9, 2), np.ones(9, int)), card=card)
    summary = summary_of(run)
    assert 'With no item masked, HR@10 is .0350 and NDCG@10 .0350; masked, .0700 and .0700' in (
        summary
    )
    assert 'Popularity: HR@10 .0050, NDCG@10 .0050 (unmasked)' in summary
    assert 'Item graph' not in summary
    # Unmasked ranks 3 and 2.
    assert f'(+{1 / np.log2(3) - 0.5:.4f}'.replace('0.', '.') in summary
    assert '75 % of the targets stand in the history of their user' in summary
    assert 'was selected by the unmasked ranking' in summary
    assert 'stand in the history' not in summary_of(full_report())


def test_the_item_graph_is_in_the_summary_and_in_the_table():
    results = make_results(popularity=0.01, item_graph=0.0234, pretrain=0.0567)
    run = smallest_report(results=results)
    assert 'Item graph: HR@10 .0234, NDCG@10 .0234 (masked).' in summary_of(run)
    rows = cells(section(html.page(run), 'metrics'))
    assert [row[0] for row in rows[1:4]] == ['POPULARITY', 'ITEM_GRAPH', 'PRETRAIN']


def test_a_stage_that_ended_at_its_limit_is_named():
    config = {'pretrain_epochs': 60, 'finetune_epochs': 5, 'patience': 5}
    stages = {
        'pretrain': {'best_epoch': 58, 'epochs': 60},
        'finetune': {'best_epoch': 0, 'epochs': 5},  # patience and limit at once
    }
    improving = {'pretrain': {'best_epoch': 60, 'epochs': 60}}
    of_improving = summary_of(smallest_report(card=CARD | {'config': config, 'stages': improving}))
    assert 'its limit of 60 epochs (best epoch 60, still improving)' in of_improving
    summary = summary_of(smallest_report(card=CARD | {'config': config, 'stages': stages}))
    assert 'Pretrain ended at its limit of 60 epochs (best epoch 58)' in summary
    assert 'finetune' not in summary.lower()


def test_lists_and_the_order_test_are_in_the_table():
    results = smallest_report().results
    for value, of_stage in zip((0.25, 0.5), results.values()):
        of_stage['lists'] = {'masked': dict.fromkeys(lists.COLUMNS, value)}
    shuffled = {p: {'ndcg@10': value} for p, value in (('masked', 0.0321), ('unmasked', 0.0123))}
    results['pretrain']['shuffled'] = shuffled
    rows = cells(section(html.page(smallest_report(results=results)), 'metrics'))
    assert [row[-1] for row in rows[:6]] == [
        *('NDCG@10 shuffled', '', '.0321'),
        *('NDCG@10 shuffled', '', '.0123'),
    ]
    assert rows[6:] == [
        ['', *lists.COLUMNS],
        ['POPULARITY', '0.2500', '0.2500', '0.25', '0.2', '0.2500'],
        ['PRETRAIN', '0.5000', '0.5000', '0.50', '0.5', '0.5000'],
    ]
    assert 'shuffled' not in html.page(full_report())


def test_the_page_is_self_contained(full):
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


@pytest.mark.parametrize('name', ODD_NAMES[:3] + ODD_NAMES[-4:-1])
def test_odd_names_are_text(name):
    source = html.page(full_report(name))
    reader = Reader(source)
    assert reader.faults == []
    assert 'script' not in {tag for tag, _ in reader.tags}
    images = [attributes for tag, attributes in reader.tags if tag == 'img']
    assert len(images) == 2 and all('onerror' not in attributes for attributes in images)
    shown = one_line(name, 120)
    assert shown in reader.texts and '\x00' not in source and '\u202e' not in source
    assert f'<bdi>{html.html.escape(shown)}</bdi>' in source
    source.encode('utf-8')


def test_ids_are_unique_and_references_resolve(full):
    reader = Reader(full)
    ids = [attributes['id'] for _, attributes in reader.tags if 'id' in attributes]
    assert len(ids) == len(set(ids)) > 50
    used = set(re.findall(r'url\(#([^)]*)\)', full))
    used |= {
        attributes[name][1:]
        for _, attributes in reader.tags
        for name in ('href', 'xlink:href')
        if attributes.get(name, '').startswith('#')
    }
    assert used <= set(ids) and any(name.startswith('gates-') for name in used)


def test_charts_have_the_colour_of_the_text_and_a_description(tmp_path):
    svg = figures.to_svg(figures.curves, {'loss': [(1, 2.0), (2, 1.0)]}, 1)
    assert 'currentColor' in svg and figures.INK not in svg and '#000000' not in svg
    source = html.chart(svg, 'name', 'Tall & <thin>')
    assert source.startswith('<figure><svg role="img" aria-label="Tall &amp; &lt;thin&gt;"')
    assert 'metadata' not in source and 'id="name-' in source and 'viewBox' in source


def test_an_image_has_no_access_to_the_page():
    source = html.image('<svg onload="alert(1)"/>', 'a "map"')
    assert 'onload' not in source and 'alt="a &quot;map&quot;"' in source


def test_groups_have_every_stage(full):
    """Ranks 1, 20 and 3 in groups of one; unmasked they are one larger."""
    rows = cells(section(full, 'groups'))
    assert rows[1:4] == [
        ['3', '1', '1.0000', '1.0000 ± .0000', '.6309', '1.0000', '1.0000'],
        ['4', '1', '.0000', '.0000 ± .0000', '.0000', '.0000', '.0000'],
        ['5', '1', '1.0000', '.5000 ± .0000', '.4307', '.5000', '.5000'],
    ]
    assert len(rows) == 8


def test_heads_and_experts(full):
    rows = cells(section(full, 'heads'))
    assert ['head 1', '55 %', '50 %', '1.000', '1.000'] in rows
    assert rows.count(['head 2', '33 %', '33 %', '33 %']) == 1
    assert 'Unused: none.' in full
    heads = full_report().heads | {'dead_heads': [1], 'dead_experts': [[0, 2]]}
    source = html.page(dataclasses.replace(full_report(), heads=heads))
    assert 'Unused: head 2, expert 3 of head 1.' in source


def test_the_target_is_marked_in_every_list():
    source = page_of(make_explanation())
    rows = cells(section(source, 'cases'))
    assert rows[:2] == [
        ['', 'recommended', 'head 1: 50 %', 'head 2: 50 %', 'equal weights'],
        ['1', 'one', 'five', 'five', 'one'],
    ]
    assert source.count('<mark><bdi>three</bdi></mark>') == 1 + 4


def test_a_history_begins_with_the_latest_item():
    explained = make_explanation(length=3)
    explained['recommended'][0]['without'] = [-0.25, 0.5, 1.0]
    explained['carried'] = [0.6, 0.3, 0.1]
    explained['heads'][0] |= {
        'router': [0.9, 0.1, 0],
        'attention': [[0.2, 0.8, 0], [1, 0, 0], [0] * 3],
    }
    rows = cells(section(page_of(explained), 'cases'))[-3:]
    assert [row[:3] for row in rows] == [
        ['three', '10 %', '0 %'],
        ['two', '30 %', '72 %'],
        ['one', '60 %', '28 %'],  # .9 * .2 + .1 * 1
    ]
    assert [row[-1] for row in rows] == ['+1.00', '+0.50', '-0.25']


def test_a_long_history_is_cut():
    explained = make_explanation(heads=0, length=25) | {'too_old': 3}
    explained['history'] = [{'item': f'no. {n}', 'title': ''} for n in range(25)]
    source = page_of(explained)
    assert '>no. 24<' in source and '>no. 5<' in source and '>no. 4<' not in source
    assert '8 earlier items' in source


def test_a_history_of_one_item_and_a_target_that_is_excluded():
    explained = make_explanation(heads=0, length=1)
    explained['target']['rank'] = None
    rows = cells(section(page_of(explained), 'cases'))
    assert rows[-2:] == [['history'], ['one']]
    assert 'rank' not in section(page_of(explained), 'cases')


def test_protocol_and_flags_are_folded_and_flags_shown_once():
    source = html.page(smallest_report(flags='--secret=<of flags.cfg>\n'))
    assert section(source, 'protocol').count('<details>') == 1
    assert ['machine, cores', '2'] in cells(section(source, 'protocol'))
    assert source.count('secret') == 1 and '&lt;of flags.cfg&gt;' in section(source, 'flags')
    assert '--flagfile=flags.cfg' in source and '1.2.3' in section(source, 'flags')


def test_the_protocol_is_in_words_before_its_table():
    card = CARD | {'split': 'leave <one> out', 'selection': 'best epoch', 'seed': 3}
    card |= {'repeats': {'test': 0.25}, 'select_on': 'masked'}
    source = section(html.page(smallest_report(card=card)), 'protocol')
    words = re.sub('<[^>]*>', '', source[source.index('<p>') : source.index('<table')])
    for sentence in (
        'Data set toys: 1,234 users and 56 items.',
        'The split is leave &lt;one&gt; out.',
        'Ties count against the target.',
        'Selection: best epoch; the test split selects nothing.',
        'The seed is 3.',
        'Of the test targets 25 % stand in the history of their user.',
    ):
        assert sentence in words
    assert 'Masked' not in words and '<details><summary>' in source[: source.index('<p>')]


def test_numbers_are_short():
    assert [html.percent(x) for x in (0, 0.004, 0.0994, 0.0996, 1)] == [
        *('0 %', '0.4 %', '9.9 %', '10 %', '100 %')
    ]
    assert [html.number(x) for x in (None, 0.5, 1.0)] == ['', '.5000', '1.0000']


def test_the_record_is_not_changed():
    run = full_report()
    before = copy.deepcopy(run)
    html.page(run)
    for field in dataclasses.fields(run):
        if field.name != 'ranks':
            assert getattr(run, field.name) == getattr(before, field.name)
    np.testing.assert_equal(run.ranks, before.ranks)
