"""The stage text, end to end on the synthetic world, and models that start from what it makes."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax import config as config_lib
from fame_jax import item_table, records, stages, text
from fame_jax import run as run_lib
from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.models.build import build, initial

FLAGS = [
    '--dataset=synthetic',
    '--synthetic_users=120',
    '--synthetic_items=150',
    '--synthetic_values=3',
    '--width=8',
    '--num_experts=2',
    '--max_length=10',
    '--row_length=16',
    '--rows_per_step=4',
    '--pretrain_epochs=1',
    '--finetune_epochs=1',
    '--progress=none',
]
PLUS = [
    '--item_init=text',
    '--text_epochs=60',
    '--text_inner_width=16',
    '--text_labels_per_step=3',
]


def start(folder, *more):
    """A run whose data is prepared."""
    run = run_lib.open_run(config_lib.parse([*FLAGS, f'--workdir={folder}', *more]))
    stages.prepare(run)
    return run


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A run with its text stage done."""
    run = start(tmp_path_factory.mktemp('text') / 'run', *PLUS)
    text.text(run)
    return run


def read(run):
    folder = run.folder / 'text'
    return np.load(folder / 'items.npy'), records.read_json(folder / 'text.json')


def read_start(run):
    data = run.data
    folder = run.folder / 'text'
    return item_table.read('text', folder, data.num_items, 8, data.card['fingerprint'])


@pytest.mark.parametrize(
    ('facets', 'num_heads', 'heads'),
    [
        (['a', 'b'], 2, ['a', 'b']),
        (['a'], 3, ['a', 'instance', 'instance']),
        (['a', 'b', 'c'], 2, ['a+b', 'c']),
        (['a', 'b', 'c'], 1, ['a+b+c']),
        (['a', 'b', 'instance'], 2, ['a+b', 'instance']),
        ([], 1, ['instance']),
    ],
)
def test_every_head_gets_a_facet(facets, num_heads, heads):
    assert text.assign(facets, num_heads) == heads


def test_planted_facets_are_merged_with_their_labels(made):
    (facet,) = text.read_items(made, ['facet_1+facet_2']).facets
    assert len(facet.labels) == 2 * 3
    for item, values in enumerate(made.data.item_facets[1:], start=1):
        assert facet.by_item()[item] == [f'facet_{m + 1}: value {v}' for m, v in enumerate(values)]


def test_instance_is_not_merged():
    with pytest.raises(UserError, match='name it last, or raise the heads'):
        text.assign(['instance', 'a', 'b'], 2)


def test_each_planted_facet_stands_out_in_its_head(made):
    _, told = read(made)
    before, after = (told['probes'][stage] for stage in ('before', 'after'))
    assert after['facets'] == told['heads'] == ['facet_1', 'facet_2']
    assert after['matching'] == [[0, 0], [1, 1]]
    assert after['matched'] > 0.8
    assert after['unmatched'] < 0.4
    assert after['matched'] > before['matched'] + 0.2


def test_shuffled_labels_leave_no_diagonal(tmp_path):
    run = start(tmp_path / 'run', *PLUS, '--shuffled_labels')
    text.text(run)
    agreement_HM = np.array(read(run)[1]['probes']['after']['neighbours'])
    diagonal = np.trace(agreement_HM) - np.trace(agreement_HM[::-1])
    assert abs(diagonal) / 2 < 0.2


def test_shuffling_deals_the_same_label_sets_to_other_items():
    label_VS = np.concatenate([[[-1, -1]], np.random.default_rng(0).integers(0, 5, (40, 2))])
    dealt_VS = text.shuffle(label_VS, seed=1)
    assert np.array_equal(dealt_VS[0], [-1, -1])
    assert sorted(map(tuple, dealt_VS)) == sorted(map(tuple, label_VS))
    assert np.mean(dealt_VS == label_VS) < 0.5


def test_after_surgery_a_heads_item_vectors_are_its_facets(made):
    """W_f selects blocks, so x_v W_f^h is facet h's own vector, up to the table's scale."""
    items_VD, _ = read(made)
    block_VHK = items_VD.reshape(-1, 2, 4)
    np.testing.assert_allclose(np.linalg.norm(block_VHK[1:], axis=-1), 1, rtol=1e-5)
    start_ = item_table.read(
        'text', made.folder / 'text', made.data.num_items, 8, made.data.card['fingerprint']
    )
    backbone, fame = (build(name, made.config, made.data.num_items) for name in ('sasrec', 'fame'))
    key = jax.random.key(0)
    pretrained = item_table.fill(initial(backbone, key), start_, 0.02, 'trained')
    plan = stages.build_plan('fame', made.config, fame, key)
    grown = stages.surgery.transplant(pretrained, initial(fame, key), plan)
    head_VHK = jnp.einsum('VD,HDK->VHK', grown['item_table'], grown['facet_block']['facet'])
    # RMS 0.02 over 8 coordinates, half of the square in each of the two blocks.
    expected_VHK = block_VHK * 0.02 * np.sqrt(8 / 2)
    np.testing.assert_allclose(head_VHK[1:], expected_VHK[1:], rtol=1e-5)


def test_the_shared_design_brings_its_own_facet_matrices(tmp_path):
    run = start(tmp_path / 'run', *PLUS, '--text_design=shared')
    text.text(run)
    start_ = item_table.read(
        'text', run.folder / 'text', run.data.num_items, 8, run.data.card['fingerprint']
    )
    params = item_table.align(initial(run.module('finetune'), jax.random.key(0)), start_)
    assert start_.facet_HDK.shape == (2, 8, 4)
    np.testing.assert_array_equal(params['facet_block']['facet'], start_.facet_HDK)
    head_VHK = np.einsum('VD,HDK->VHK', start_.items_VD, start_.facet_HDK)[1:]
    found = text.probe.match_heads(
        head_VHK.swapaxes(0, 1), [v[1:, None] for v in run.data.item_facets.T]
    )
    assert found['matching'] == [[0, 0], [1, 1]]


def best(run, stage):
    module = run.module(stage)
    like = jax.eval_shape(functools.partial(initial, module), jax.random.key(0))
    with run.checkpoints(stage) as checkpoints:
        return checkpoints.restore(best=like)['best']


def test_no_text_epochs_are_fame_with_that_initialisation(tmp_path):
    plus = start(tmp_path / 'plus', *PLUS, '--text_epochs=0')
    for stage in (text.text, stages.pretrain, stages.finetune):
        stage(plus)
    given = start(tmp_path / 'given', f'--item_init={plus.folder}/text/items.npy')
    for stage in (stages.pretrain, stages.finetune):
        stage(given)
    for stage in ('pretrain', 'finetune'):
        one, other = (jax.tree.leaves(best(run, stage)) for run in (plus, given))
        assert all(np.array_equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize('training', ['frozen', 'added'])
def test_a_frozen_table_stays_and_the_rest_learns(made, tmp_path, training):
    path = made.folder / 'text' / 'items.npy'
    flags = [f'--item_init={path}', f'--item_training={training}', '--weight_decay=0.1']
    run = start(tmp_path / 'run', *flags, '--model=sasrec', '--stages=prepare,pretrain')
    fresh = initial(run.module('pretrain'), jax.random.key(0))
    assert ('item_table' in fresh) == (training == 'added')
    stages.pretrain(run)
    with run.checkpoints('pretrain') as checkpoints:
        last = checkpoints.restore(params=fresh)['params']
    given = item_table.fill(fresh, item_table.Start(np.load(path)), 0.08, training)
    np.testing.assert_array_equal(last['frozen_table'][1:], given['frozen_table'][1:])
    if training == 'added':
        assert not np.array_equal(last['item_table'], fresh['item_table'])


def test_the_stage_is_done_once_and_comes_out_the_same(made, tmp_path):
    again = start(tmp_path / 'run', *PLUS)
    text.text(again)
    np.testing.assert_array_equal(read(made)[0], read(again)[0])
    stamp = (again.folder / 'text' / 'items.npy').stat().st_mtime_ns
    text.text(again)
    assert (again.folder / 'text' / 'items.npy').stat().st_mtime_ns == stamp


def test_what_was_made_of_other_data_is_refused(made, tmp_path):
    run = start(tmp_path / 'run', *PLUS, '--synthetic_seed=1')
    (made.folder / 'text').rename(run.folder / 'text')
    try:
        with pytest.raises(UserError, match='was made of other data'):
            text.text(run)
    finally:
        (run.folder / 'text').rename(made.folder / 'text')


def test_a_folder_with_a_file_missing_is_made_again(made, tmp_path):
    run = start(tmp_path / 'run', *PLUS, '--text_epochs=1')
    text.text(run)
    (run.folder / 'text' / 'items.npy').unlink()
    text.text(run)
    assert (run.folder / 'text' / 'items.npy').is_file()


def test_the_whole_of_it_is_judged_and_drawn(tmp_path, capsys):
    stage_names = '--stages=prepare,text,pretrain,finetune,evaluate'
    flags = [*FLAGS, *PLUS, '--text_epochs=1', '--unseen_items=kept', stage_names]
    assert main([*flags, f'--workdir={tmp_path}']) == 0
    assert 'FAME+ (H 2, N 2' in capsys.readouterr().out
    results = records.read_json(tmp_path / 'results.json')['results']
    assert results['finetune']['facets']['facets'] == ['facet_1', 'facet_2']
    assert np.shape(results['finetune']['facets']['probe']) == (2, 2)
    for name in ('heads.svg', 'items.svg'):
        assert (tmp_path / name).read_text().rstrip().endswith('</svg>')


def test_kept_rows_are_those_that_no_history_holds(tmp_path):
    run = start(tmp_path / 'run', *PLUS, '--unseen_items=kept', '--text_epochs=0')
    text.text(run)
    stages.pretrain(run)
    fresh = stages._begin(
        run,
        'pretrain',
        initial(run.module('pretrain'), jax.random.fold_in(stages._key(run.config, 'pretrain'), 0)),
        jax.random.key(0),
    )
    with run.checkpoints('pretrain') as checkpoints:
        last = checkpoints.restore(params=fresh)['params']
    items, _ = stages.sequences.split_training(run.data)
    moved_V = np.any(np.asarray(last['item_table'] != fresh['item_table']), axis=1)
    assert sorted(np.flatnonzero(moved_V)) == sorted({*items.tolist()})


def vectors(tmp_path, array):
    path = tmp_path / 'vectors.npy'
    np.save(path, array.astype(np.float32))
    return f'--text_encoder={path}'


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_vectors_that_are_all_alike_are_refused(made, tmp_path, value):
    flag = vectors(tmp_path, np.full((made.data.num_items + 1, 5), value))
    run = start(tmp_path / 'run', *PLUS, flag)
    with pytest.raises(UserError, match='are alike or zero'):
        text.text(run)


def test_vectors_alone_need_no_file_of_items(log, tmp_path):
    flag = vectors(tmp_path, np.random.default_rng(0).normal(size=(10, 5)))
    assert log(['not read'], '--facets=instance', flag) == 0
    assert records.read_json(tmp_path / 'run' / 'text' / 'text.json')['probes']['after'] == {}


def test_a_facet_without_a_pair_is_refused(made):
    has_text_V = np.zeros(made.data.num_items + 1, bool)
    has_text_V[1] = True
    facets = text.read_items(made, ['facet_1']).facets
    with pytest.raises(UserError, match='no two items with a text share a label'):
        text.make_pools(made.config, ['facet_1'], facets, has_text_V)


# A user's log with a file of its items.

HISTORIES = ''.join(
    f'{u} ' + ' '.join(f'{(u + i) % 9 + 1}' for i in range(6)) + '\n' for u in range(9)
)
ITEMS = [
    {'item_id': i, 'title': f'thing {i}', 'kind': 'odd' if i % 2 else 'even', 'one': 'same'}
    for i in range(1, 10)
]


@pytest.fixture
def log(tmp_path):
    """A log, and a function that writes its items and runs the text stage on them."""
    path = tmp_path / 'mine.txt'
    path.write_text(HISTORIES)

    def run(lines, *more):
        content = ''.join(
            line if isinstance(line, str) else json.dumps(line) + '\n' for line in lines
        )
        (tmp_path / 'mine_items.jsonl.gz').write_bytes(gzip.compress(content.encode()))
        flags = [*FLAGS[5:], f'--dataset={path}', f'--workdir={tmp_path / "run"}', '--k_core=0']
        flags += ['--stages=prepare,text', *PLUS, '--commonest_label=0.9', *more]
        return main(flags)

    return run


def test_items_beside_a_log_are_found(log, tmp_path):
    assert log(ITEMS, '--facets=kind') == 0
    told = records.read_json(tmp_path / 'run' / 'text' / 'text.json')
    assert told['heads'] == ['kind', 'instance']
    assert told['card']['matched'] == 9


@pytest.mark.parametrize(
    ('lines', 'flags', 'message'),
    [
        (ITEMS, [], '--facets names no facet'),
        (ITEMS, ['--facets=colour'], 'colour'),
        (ITEMS, ['--facets=one'], 'two are needed'),
        ([{**item, 'item_id': None} for item in ITEMS], ['--facets=kind'], 'line 1'),
        ([*ITEMS, {**ITEMS[0], 'title': 'other'}], ['--facets=kind'], 'line 10'),
        (
            [{**item, 'title': ''} for item in ITEMS],
            ['--facets=kind', '--text_fields=title'],
            'text',
        ),
        (
            [{**item, 'item_id': item['item_id'] + 90} for item in ITEMS],
            ['--facets=kind'],
            'no item',
        ),
        (['{"item_id": 1, "title": '], ['--facets=kind'], 'line 1'),
        (ITEMS, ['--facets=kind', '--text_encoder=nowhere'], 'no such text encoder'),
        (ITEMS, ['--facets=kind', '--items=nowhere.csv'], 'nowhere.csv'),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(log, capsys, tmp_path, lines, flags, message):
    assert log(lines, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert message in error
    assert (tmp_path / 'run' / 'dataset' / 'dataset.json').is_file()
    assert not (tmp_path / 'run' / 'text').exists()
