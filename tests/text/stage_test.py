"""The stage text on the synthetic data set and on a user's file of items."""

import json
import types

import numpy as np
import pytest

from fame_jax import run_dir
from fame_jax.data import synthetic
from fame_jax.errors import UserError
from fame_jax.screen import Screen
from fame_jax.stages.text import text

OPTIONS = ('epochs=60', 'inner_width=16', 'labels_per_step=3', 'commonest_label=0.9')
QUICK = ('epochs=1', *OPTIONS[1:])
ITEMS = [
    {'item_id': f'i{i}', 'title': f'thing {i}', 'kind': 'odd' if i % 2 else 'even'}
    for i in range(1, 10)
]


def context(folder, data=None, options=OPTIONS, **text_config):
    """What the stage needs of a run: settings, folder, data and the model."""
    data = data or synthetic.generate(users=120, items=150, values=3)
    text_config = {
        **{'items': '', 'text_fields': (), 'facets': (), 'text_encoder': 'tfidf'},
        **{'text_options': options, 'item_init': 'text', 'text_path': 0.0},
        **text_config,
    }
    config = types.SimpleNamespace(
        run=types.SimpleNamespace(seed=0),
        data=types.SimpleNamespace(
            dataset='mine.csv' if data.item_facets is None else 'synthetic',
            data_dir='',
            column_names={},
            synthetic_options={'seed': 0},
        ),
        text=types.SimpleNamespace(**text_config),
        devices=types.SimpleNamespace(cache_dir=str(folder / 'cache')),
    )
    return types.SimpleNamespace(
        config=config,
        folder=folder,
        begin_writing=lambda: None,
        screen=Screen('none'),
        metrics=run_dir.Metrics(folder / 'metrics.jsonl'),
        data=data,
        module=lambda stage: types.SimpleNamespace(width=8, num_heads=2),
    )


def user_data():
    ids = ['', *(item['item_id'] for item in ITEMS)]
    return types.SimpleNamespace(
        item_facets=None, item_ids=ids, num_items=len(ITEMS), card={'fingerprint': 'x'}
    )


def read(folder):
    return np.load(folder / 'text' / 'items.npy'), run_dir.read_json(folder / 'text' / 'text.json')


def test_planted_facets_are_separated_and_the_stage_runs_once(tmp_path):
    run = context(tmp_path)
    text(run)
    items_VD, record = read(tmp_path)
    before, after = (record['probes'][name] for name in ('before', 'after'))
    assert after['facets'] == record['heads'] == ['facet_1', 'facet_2']
    assert after['matching'] == [[0, 0], [1, 1]]
    assert after['matched'] > max(0.8, before['matched'] + 0.2) and after['unmatched'] < 0.4
    assert record['data_sha256'] == run.data.card['fingerprint']
    length_VH = np.linalg.norm(items_VD[1:].reshape(-1, 2, 4), axis=-1)
    np.testing.assert_allclose(length_VH, 1, rtol=1e-5)
    lines = run.metrics.read()
    assert [line['epoch'] for line in lines] == list(range(1, 61))
    assert lines[-1]['loss/0_facet_1'] < lines[0]['loss/0_facet_1']
    stamp = (tmp_path / 'text' / 'items.npy').stat().st_mtime_ns
    text(run)
    assert (tmp_path / 'text' / 'items.npy').stat().st_mtime_ns == stamp


def test_a_missing_file_is_written_again_with_the_same_bits(tmp_path):
    run = context(tmp_path, options=QUICK)
    text(run)
    first, _ = read(tmp_path)
    (tmp_path / 'text' / 'items.npy').unlink()
    text(run)
    np.testing.assert_array_equal(read(tmp_path)[0], first)


def test_a_file_of_items_or_of_vectors(tmp_path):
    path = tmp_path / 'items.jsonl'
    path.write_text(''.join(json.dumps(item) + '\n' for item in ITEMS))
    text(context(tmp_path, user_data(), items=str(path), facets=('kind',), options=QUICK))
    _, record = read(tmp_path)
    assert record['heads'] == ['kind', 'instance'] and record['card']['matched'] == len(ITEMS)
    (tmp_path / 'text' / 'text.json').unlink()
    encoder = tmp_path / 'vectors.npy'
    np.save(encoder, np.random.default_rng(0).normal(size=(len(ITEMS) + 1, 5)))
    text(
        context(
            tmp_path, user_data(), facets=('instance',), text_encoder=str(encoder), options=QUICK
        )
    )
    assert read(tmp_path)[1]['probes']['after'] == {}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({}, '--facets is empty'),
        ({'facets': ('colour',)}, "no field for facet 'colour'"),
        ({'facets': ('kind',), 'options': ('epoch=1',)}, 'did you mean epochs'),
        ({'facets': ('kind',), 'options': ('dropout=0',)}, 'dropout=0 makes the two views'),
        ({'facets': ('kind',), 'text_encoder': 'nowhere'}, 'there is no such encoder'),
        ({'facets': ('kind',), 'items': 'nowhere.csv'}, 'nowhere.csv'),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(tmp_path, changes, message):
    path = tmp_path / 'items.jsonl'
    path.write_text(''.join(json.dumps(item) + '\n' for item in ITEMS))
    with pytest.raises(UserError) as error:
        text(context(tmp_path, user_data(), **{'items': str(path), **changes}))
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'text').exists()
