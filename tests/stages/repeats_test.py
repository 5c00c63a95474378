"""Data with repeats, lists and the order test, followed through whole runs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import make_world

from fame_jax import stages
from fame_jax.config import flags
from fame_jax.evaluation import lists, metrics
from fame_jax.evaluation.ranker import Ranker
from fame_jax.main import main
from fame_jax.models.item_model import ItemModel
from fame_jax.serving.recommender import ServedModel
from fame_jax.stages.evaluate import _list_metrics, _rank_after_shuffling, _rare_targets
from fame_jax.stages.top_lists import top_lists

# The targets of validation and test stand in their history for three of four users.
REPEATS = [[1, 2, 1, 2], [3, 4, 3, 4], [5, 6, 7, 5, 6], [1, 3, 5, 7]]
# 60 users with eight actions on five items: targets stand in most histories.
WORLD = np.random.default_rng(0).integers(1, 6, (60, 8)).tolist()
SHARES = {
    split: np.mean([history[-last] in history[:-last] for history in WORLD])
    for split, last in (('validation', 2), ('test', 1))
}
MODEL = ('--model=gru4rec', '--width=8', '--max_length=6', '--row_length=8')


def open_run(folder, *more):
    return stages.open_run(flags.parse([f'--workdir={folder}', '--progress=none', *more]))


@pytest.mark.parametrize(
    'select_on, repeats, masked',
    [
        ('auto', [[1, 2, 3, 4]], True),
        ('auto', [[1, 2, 2, 4], [1, 2, 3, 4]], True),  # half of the targets is not the rule
        ('auto', [[1, 2, 2, 4]], False),
        ('auto', [[1, 2, 3, 1]], True),  # the validation target decides
        ('masked', [[1, 2, 2, 4]], True),
        ('unmasked', [[1, 2, 3, 4]], False),
    ],
)
def test_the_data_decide_by_which_ranking_epochs_are_selected(select_on, repeats, masked, tmp_path):
    make_world(tmp_path, repeats)
    assert open_run(tmp_path, f'--select_on={select_on}').selects_masked == masked


@pytest.mark.parametrize(
    'progress, masked',
    [({'finished': True}, True), ({'select_on': 'unmasked/ndcg@20'}, False), ({}, False)],
)
def test_a_trained_run_keeps_its_ranking(progress, masked, tmp_path, monkeypatch):
    """The ranking is stored since version 0.3; without a checkpoint the data decide."""
    make_world(tmp_path, [[1, 2, 2, 4]])
    run = open_run(tmp_path)
    monkeypatch.setattr(run, 'progress', {'pretrain': progress, 'finetune': {}}.get)
    assert run.selects_masked == masked


def test_the_share_of_repeated_targets(tmp_path):
    make_world(tmp_path, REPEATS)
    assert open_run(tmp_path).repeats == {'validation': 3 / 4, 'test': 3 / 4}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folders of runs by --select_on, of data with repeats.

    Masked validation falls after epoch 1, and the unmasked rises until epoch 2.
    """
    found = {}
    of_validation = Ranker.metrics
    with pytest.MonkeyPatch.context() as patch:
        for name in ('auto', 'masked'):
            folder = tmp_path_factory.mktemp(name)
            make_world(folder, WORLD)
            scores = iter([(0.1, 0.1), (0.5, 0.2), (0.3, 0.4), (0.2, 0.3)])

            def scripted(*args, scores=scores):
                masked, unmasked = next(scores)
                found = of_validation(*args)
                assert {'ndcg@20', 'unmasked/ndcg@20', 'unmasked/mrr'} <= {*found}
                return found | {'ndcg@20': masked, 'unmasked/ndcg@20': unmasked}

            patch.setattr(Ranker, 'metrics', scripted)
            argv = [f'--workdir={folder}', '--stages=pretrain,evaluate', *MODEL]
            argv += ['--pretrain_epochs=3', f'--select_on={name}', '--learning_rate=0.1']
            argv += ['--shuffle_histories=all_but_last', '--progress=none']
            assert main(argv) == 0
            found[name] = folder
    return found


@pytest.mark.parametrize('name, protocol, best', [('auto', 'unmasked', 2), ('masked', 'masked', 1)])
def test_a_run_is_selected_by_the_chosen_ranking(name, protocol, best, runs):
    results = json.loads((runs[name] / 'results.json').read_text())
    card, of_stage = results['card'], results['results']['pretrain']
    assert card['select_on'] == card['stages']['pretrain']['select_on'] == protocol
    assert card['stages']['pretrain']['best_epoch'] == best
    assert f'ndcg@20, {protocol}' in card['selection']
    assert card['repeats'] == pytest.approx(SHARES) and SHARES['validation'] > 0.5
    assert {*of_stage['lists']} == {protocol}
    logged = [json.loads(line) for line in (runs[name] / 'metrics.jsonl').read_text().splitlines()]
    validated = [line for line in logged if line['split'] == 'validation']
    assert [line['unmasked/ndcg@20'] for line in validated] == [0.1, 0.2, 0.4, 0.3]
    assert [line['ndcg@20'] for line in validated] == [0.1, 0.5, 0.3, 0.2]


def test_another_ranking_is_another_run(runs, capsys):
    argv = [f'--workdir={runs["auto"]}', '--stages=evaluate', '--progress=none']
    assert main([*argv, '--select_on=masked']) == 2
    error = capsys.readouterr().err
    assert 'holds another run: --select_on=masked (there: auto)' in error


def test_the_order_test_stands_beside_the_plain_figures(runs):
    results = json.loads((runs['auto'] / 'results.json').read_text())['results']
    ranks = np.load(runs['auto'] / 'ranks.npz')
    for name in ('popularity', 'item_graph', 'pretrain'):
        for protocol in metrics.PROTOCOLS:
            for split in ('test', 'shuffled'):
                expected = metrics.metrics(ranks[f'{name}/{split}/{protocol}'])
                assert results[name][split][protocol] == expected
    assert results['popularity']['shuffled'] == results['popularity']['test']
    assert np.any(ranks['pretrain/shuffled/unmasked'] != ranks['pretrain/test/unmasked'])


def test_without_the_flag_there_is_no_order_test_and_the_figures_are_the_same(runs, capsys):
    before = json.loads((runs['masked'] / 'results.json').read_text())['results']
    argv = [f'--workdir={runs["masked"]}', '--stages=evaluate']
    assert main([*argv, '--progress=lines', '--shuffle_histories=all_but_last']) == 0
    first = capsys.readouterr().out
    again = json.loads((runs['masked'] / 'results.json').read_text())['results']
    assert before == again  # the random order is the same each time
    assert 'SHUFFLED NDCG@10' in first and 'with the items before the last in random order' in first
    assert main([*argv, '--progress=lines']) == 0
    second = capsys.readouterr().out
    plain = json.loads((runs['masked'] / 'results.json').read_text())['results']
    for name, of_stage in plain.items():
        assert of_stage == {part: before[name][part] for part in before[name] if part != 'shuffled'}
    assert 'shuffled' not in {name.split('/')[1] for name in np.load(runs['masked'] / 'ranks.npz')}
    assert 'SHUFFLED' not in second and 'random order' not in second
    share = f'{SHARES["test"]:.0%} of the test targets stand in the history of their user'
    for text in (first, second):
        assert share in text
        assert 'pretrain ended at its limit of 3 epochs (best epoch 1)' in text
        assert 'lists, masked' in text and 'coverage@10' in text


@pytest.mark.parametrize('name, said', [('auto', True), ('masked', False)])
def test_recommend_says_that_items_of_a_history_may_be_recommended(name, said, runs, capsys):
    argv = [f'--workdir={runs[name]}', '--stages=recommend', '--progress=lines']
    assert main(argv) == 0
    line = f'the unmasked ranking ({SHARES["validation"]:.0%} of the validation targets stand'
    assert (line in capsys.readouterr().err) == said
    text = (runs[name] / 'recommendations.jsonl').read_text()
    lists = [json.loads(one) for one in text.splitlines()]
    repeated = [set(one['items']) & {str(item) for item in h} for one, h in zip(lists, WORLD)]
    assert any(repeated) == said
    assert main([*argv, '--filter_seen']) == 0
    assert 'unmasked ranking' not in capsys.readouterr().err


def test_the_order_test_needs_the_stage_evaluate(tmp_path, capsys):
    argv = [f'--workdir={tmp_path}', '--stages=pretrain', '--shuffle_histories=all_but_last']
    assert main(argv) == 2
    assert '--shuffle_histories=all_but_last has no effect' in capsys.readouterr().err


# Models by hand: queries count items, and all scores are whole numbers without rounding.

HISTORIES = [[1, 2, 3, 4, 5, 6, 7], [3, 1, 4, 1, 5], [2, 7, 1, 8], [6, 5, 4, 3, 2, 1], [8, 7, 6]]


def served(encode):
    """A model of HISTORIES with whole numbers as item vectors."""
    item_VD = np.random.default_rng(0).integers(0, 100, (9, 9)).astype(np.float32)
    item_VD[:, 0] = 0  # padding of the rows counts for nothing
    return ServedModel(encode, ItemModel.combine, None, jnp.asarray(item_VD), 6)


def bag(params, tokens_BL, positions_BL, segments_BL):
    """The query is the number of times that each item occurs."""
    return jnp.eye(9)[tokens_BL].sum(axis=1)[:, None]


def first_item(params, tokens_BL, positions_BL, segments_BL):
    """The query is the first item that the model reads."""
    first_B1 = jnp.argmax(segments_BL > 0, axis=1)[:, None]
    return jnp.eye(9)[jnp.take_along_axis(tokens_BL, first_B1, axis=1)]


def last_item(params, tokens_BL, positions_BL, segments_BL):
    return jnp.eye(9)[tokens_BL[:, -1:]]


def plain_ranks(run, model):
    """Unmasked ranks of the test targets by a loop; None: the model reads no order."""
    ranks = []
    for history in HISTORIES:
        row = np.array([history[:-1][-6:]])
        ones = np.ones_like(row)
        score_V = np.asarray(model.encode(None, row, ones, ones))[0, 0] @ model.item_VD.T
        ranks.append(sum(score_V[v] >= score_V[history[-1]] for v in range(1, 9)))
    return ranks


@pytest.mark.parametrize(
    'encode, reads_order', [(bag, False), (last_item, False), (first_item, True)]
)
def test_only_a_model_that_reads_the_order_changes(encode, reads_order, tmp_path):
    """Each history five times, since one may be unchanged by chance; the last item stays."""
    make_world(tmp_path, HISTORIES * 5)
    run, model = open_run(tmp_path, '--max_length=6'), served(encode)
    found = _rank_after_shuffling(run, model).unmasked
    assert (found.tolist() == plain_ranks(run, model) * 5) != reads_order
    again = _rank_after_shuffling(run, model).unmasked
    np.testing.assert_array_equal(found, again)


# Lists.


@pytest.mark.parametrize('masked', [True, False])
def test_lists_are_the_best_items_by_a_loop(masked, tmp_path, monkeypatch):
    """With ten places and eight items, a masked list is shorter by the items of the history."""
    make_world(tmp_path, HISTORIES)
    run, model = open_run(tmp_path, '--max_length=6'), served(bag)
    expected = []
    for history in HISTORIES:
        row = np.array([history[:-1][-6:]])
        score_V = np.asarray(bag(None, row, None, None))[0, 0] @ model.item_VD.T
        seen = set(history[:-1]) if masked else set()
        best = sorted((v for v in range(1, 9) if v not in seen), key=lambda v: (-score_V[v], v))
        expected.append(best + [0] * (8 - len(best)))
    whole = top_lists(run, model, masked=masked)
    assert whole.tolist() == expected
    monkeypatch.setattr('fame_jax.stages.top_lists.MAX_SCORES', 16)  # two histories at a time
    np.testing.assert_array_equal(top_lists(run, model, masked=masked), whole)


def test_popularity_of_lists_is_that_of_training_actions_alone(tmp_path):
    """Item 9 is every user's test target, 10 their validation target: neither is trained on."""
    histories = [[*range(1, n), 10, 9] for n in (3, 4, 5)]
    make_world(tmp_path, histories)
    run = open_run(tmp_path)

    def one_item(params, tokens_BL, positions_BL, segments_BL):
        return jnp.ones((len(tokens_BL), 1, 1))

    item_VD = np.zeros((11, 1), np.float32)
    item_VD[9] = 1
    model = ServedModel(one_item, ItemModel.combine, None, jnp.asarray(item_VD), 6)
    first_U1 = top_lists(run, model, masked=True)[:, :1]
    assert first_U1.tolist() == [[9]] * 3
    found = lists.list_metrics(first_U1, *run.data.training_histories(), 10)
    assert (found['arp@10'], found['popular@10']) == (0, 0)
    assert found['novelty@10'] == pytest.approx(np.log2(3))
    assert {*_list_metrics(run, model)} == {'masked'}


@pytest.mark.parametrize('protocol', metrics.PROTOCOLS)
def test_rare_targets_have_the_figure_of_the_ranking_that_selects(protocol):
    groups = {
        'unseen': {'users': 0, 'masked': {'hr@10': 0.0}, 'unmasked': {'hr@10': 0.0}},
        'rare': {'users': 3, 'masked': {'hr@10': 0.25}, 'unmasked': {'hr@10': 0.5}},
    }
    of_stage = {'model': 'm', 'lists': {protocol: {}}, 'by_target': {'test': groups}}
    value = groups['rare'][protocol]['hr@10']
    assert _rare_targets({'popularity': of_stage}) == (
        f'\nTargets seen 1 to 5 times in training (3 users), {protocol} HR@10: m {value:.4f}.'
    )
