"""The stage similar, through the command line, and the names of heads."""

import json
import types

import numpy as np
import polars as pl
import pytest

from fame_jax.api import load
from fame_jax.data.dataset import Dataset
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.serving import export
from fame_jax.stages.facet_names import distinct, head_names

PLUS = [
    *('--progress=none', '--width=8', '--num_blocks=1', '--num_experts=2', '--max_length=10'),
    *('--row_length=16', '--pretrain_epochs=1', '--finetune_epochs=1', '--item_init=text'),
    *('--text_options=epochs=2', '--synthetic=users=60,items=40,facets=2'),
]


def use(folder, stage, *more):
    return main(['--progress=none', f'--workdir={folder}', f'--stages={stage}', *more])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_every_item_by_all_and_by_each_head(trained, tmp_path):
    for ending in ('jsonl', 'csv', 'parquet'):
        assert use(trained, 'similar', f'--out={tmp_path}/s.{ending}', '--top_k=3') == 0
    found, recommender = lines(tmp_path / 's.jsonl'), load(trained)
    assert recommender.facets == ['head 1', 'head 2']
    ids = Dataset.load(trained / 'dataset').item_ids
    ways = ['all', 'head 1', 'head 2']
    assert [(line['item'], line['by']) for line in found] == [
        (i, by) for i in ids[1:] for by in ways
    ]
    for line in found[:30]:
        expected = recommender.similar_items(line['item'], 3, line['by'])
        assert line['items'] == expected.items and line['score_kind'] == 'cosine'
        np.testing.assert_allclose(line['scores'], expected.scores, rtol=1e-5)
    assert any(a['items'] != b['items'] for a, b in zip(found[0::3], found[1::3]))
    csv = pl.read_csv(tmp_path / 's.csv', schema_overrides={'title': pl.String})
    parquet = pl.read_parquet(tmp_path / 's.parquet')
    rows = [
        (line['item'], line['by'], rank, similar)
        for line in found
        for rank, similar in enumerate(line['items'], 1)
    ]
    for table in (csv, parquet):
        assert table.columns == ['item', 'by', 'rank', 'similar', 'title', 'score']
        assert table.select('item', 'by', 'rank', 'similar').rows() == rows


def test_some_items_are_chosen(trained, tmp_path):
    chosen = ['item-7', 'item-3']
    flags = [f'--similar_items={",".join(chosen)}', f'--out={tmp_path}/s.jsonl']
    (tmp_path / 'titles.csv').write_text('item_id,title\nitem-7,Seven\nitem-3,Three\n')
    assert use(trained, 'similar', *flags, f'--items={tmp_path}/titles.csv', '--top_k=99') == 0
    found = lines(tmp_path / 's.jsonl')
    assert [line['item'] for line in found] == ['item-7'] * 3 + ['item-3'] * 3
    assert {line['title'] for line in found[:3]} == {'Seven'}
    assert all(len(line['items']) == 39 and line['item'] not in line['items'] for line in found)
    assert found[0]['titles'][found[0]['items'].index('item-3')] == 'Three'


def test_mistakes_are_one_line(trained, tmp_path, capsys):
    for flags, words in (
        (['--similar_items=item-1,who?'], "--similar_items: ['who?'] not in the catalogue"),
        (
            ['--histories=x.jsonl'],
            '--histories=x.jsonl has no effect where --stages=similar',
        ),
        (['--nofilter_seen'], '--filter_seen=false has no effect where --stages=similar'),
        ([f'--out={tmp_path}/s.txt'], 's.txt: lists are written to .jsonl'),
    ):
        capsys.readouterr()
        assert use(trained, 'similar', *flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count('\n') == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def branched(tmp_path_factory):
    """A run of three SASRecs side by side, from texts."""
    folder = tmp_path_factory.mktemp('branched') / 'run'
    argv = [flag for flag in PLUS if not flag.startswith(('--width', '--num_exp', '--finetune'))]
    argv += ['--model=branched_sasrec', '--width=12', '--stages=prepare,text,pretrain,export']
    assert main([*argv, f'--workdir={folder}']) == 0
    return folder


def test_items_are_similar_by_each_branch(branched):
    run, exported = load(branched), export.load(branched / 'export')
    assert run.facets == exported.facets == ['branch 1', 'branch 2', 'branch 3']
    item_VRK = np.asarray(run.model.item_VD)[1:].reshape(-1, 3, 4)
    ids = Dataset.load(branched / 'dataset').item_ids[1:]
    for r, name in enumerate(run.facets):
        x_VK = item_VRK[:, r] / np.linalg.norm(item_VRK[:, r], axis=1, keepdims=True)
        cosine_V = x_VK @ x_VK[6]
        cosine_V[6] = -2
        expected = [ids[v] for v in np.argsort(-cosine_V, kind='stable')[:5]]
        for recommender in (run, exported):
            assert recommender.similar_items(ids[6], 5, name).items == expected
            assert recommender.similar_items(ids[6], 5, r + 1).items == expected
    with pytest.raises(ValueError, match='no such head or branch; use'):
        run.similar_items(ids[6], 5, 'brand')


# Names of heads


@pytest.fixture(scope='module')
def plus(tmp_path_factory):
    """A run of FAME+ whose heads were trained for a facet each."""
    folder = tmp_path_factory.mktemp('plus') / 'run'
    stages = '--stages=prepare,text,pretrain,finetune,evaluate,report,export'
    assert main([*PLUS, stages, f'--workdir={folder}']) == 0
    return folder


def test_heads_of_fame_plus_carry_their_facets_everywhere(plus, tmp_path):
    names = ['facet_1', 'facet_2']
    run, exported = load(plus), export.load(plus / 'export')
    for recommender in (run, exported):
        assert recommender.facets == names
        explanation = recommender.explain(['item-1', 'item-2'], 3)
        assert [head['name'] for head in explanation.heads] == names
        by_name = recommender.similar_items('item-1', 5, 'facet_2')
        assert by_name == recommender.similar_items('item-1', 5, 2)
    assert run.similar_items('item-1', 5, 2) == exported.similar_items('item-1', 5, 2)
    assert use(plus, 'similar', f'--out={tmp_path}/s.jsonl', '--similar_items=item-1') == 0
    assert [line['by'] for line in lines(tmp_path / 's.jsonl')] == ['all', *names]
    page = (plus / 'report.html').read_text()
    assert 'facet_1: ' in page and '>head 1<' not in page
    results = json.loads((plus / 'results.json').read_text())['results']
    assert results['finetune']['facets']['heads'] == names


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({}, True),
        ({'item_init': 'random'}, False),
        ({'shuffled': 'true'}, False),
        ({'facet_init': 'random'}, False),
        ({'num_heads': 3}, False),
        ({'branches': 1}, True),
        ({'branches': 2}, False),  # four heads
        ({'branches': 2, 'num_heads': 1}, True),
        ({'facet_init': None}, False),  # a model without heads
    ],
)
def test_heads_are_named_only_where_each_was_trained_for_a_facet(change, named, tmp_path):
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text' / 'text.json').write_text(json.dumps({'heads': ['brand', 'genre']}))
    values = {'item_init': 'text', 'shuffled': 'false', 'facet_init': 'slices', 'num_heads': 2}
    values |= change
    text = types.SimpleNamespace(
        item_init=values['item_init'], options={'shuffled_labels': values['shuffled']}
    )
    options = {'width': 48} | {n: values[n] for n in ('num_heads', 'branches') if n in values}
    name = 'sasrec'
    if values['facet_init']:
        name = 'branched_fame' if 'branches' in values else 'fame'
        options['facet_init'] = values['facet_init']
    module = registry.make(name, options, num_items=9)
    for source, folder in (('pretrain', tmp_path), (str(tmp_path), tmp_path / 'other')):
        training = types.SimpleNamespace(backbone=source)
        config = types.SimpleNamespace(text=text, training=training)
        context = types.SimpleNamespace(config=config, folder=folder)
        assert head_names(context, module) == (['brand', 'genre'] if named else [])


def test_names_that_could_mean_another_head_have_its_number():
    assert distinct(['brand', 'instance', 'instance']) == [
        *('brand', 'instance (head 2)', 'instance (head 3)')
    ]
    assert distinct(['all', 'head 1']) == ['all (head 1)', 'head 1 (head 2)']
