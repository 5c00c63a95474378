"""Explanations: shares that add up, lists that are what they say, and the identity of eq. 11."""

import numpy as np
import pytest
from export_test import histories_of, recommender_of
from serve_test import make, tiny_run  # noqa: F401

from fame_jax import explain as explain_lib
from fame_jax import screen, serve
from fame_jax.explain import explain


@pytest.fixture(scope='module')
def fame(tiny_run):  # noqa: F811
    run, module, params = tiny_run('fame')
    return recommender_of(run, module, params), histories_of(run)


def test_the_parts_of_fame_add_up(fame):
    recommender, histories = fame
    for history in histories[:3] + histories[-2:]:
        found = explain(recommender, history, 3)
        length = len(found['history'])
        assert length == min(len(history), 10)
        assert found['too_old'] == len(history) - length
        assert [entry['item'] for entry in found['history']] == history[-length:]
        assert sum(head['share'] for head in found['heads']) == pytest.approx(1)
        assert sum(found['carried']) == pytest.approx(1)
        for head in found['heads']:
            router_LN, attention_NL = np.array(head['positions']), np.array(head['attention'])
            assert router_LN.shape == (length, 2) and attention_NL.shape == (2, length)
            np.testing.assert_allclose(router_LN.sum(1), 1, rtol=1e-5)
            assert head['router'] == head['positions'][-1]  # FAME is read at the last item
            np.testing.assert_allclose(attention_NL.sum(1), 1, rtol=1e-5)
        assert found['identity'] < 1e-4


def test_the_list_is_the_recommenders_and_the_scores_are_sums_of_the_heads(fame):
    recommender, histories = fame
    history = histories[0]
    found = explain(recommender, history, 40, filter_seen=False)
    answer = recommender.recommend(history, 40, filter_seen=False)
    assert [entry['item'] for entry in found['recommended']] == answer.items
    of_head = [{e['item']: e['score'] for e in head['top']} for head in found['heads']]
    gates = [head['gate'] for head in found['heads']]
    alike = {e['item']: e['score'] for e in found['equal_gates']}
    for item, score in zip(answer.items, answer.scores):
        parts = [scores[item] for scores in of_head]
        assert score == pytest.approx(np.dot(gates, parts), abs=1e-4)
        assert alike[item] == pytest.approx(np.mean(gates) * sum(parts), abs=1e-4)


def test_what_is_left_out_is_told_by_leaving_it_out(fame):
    """Against the recommender itself, asked without each item in turn."""
    recommender, histories = fame
    history = histories[1][-6:]
    found = explain(recommender, history, 3)
    for entry in found['recommended']:
        for j, change in enumerate(entry['without']):
            rest = history[:j] + history[j + 1 :]
            answer = recommender.recommend(rest, 40, filter_seen=False)
            score = answer.scores[answer.items.index(entry['item'])]
            assert change == pytest.approx(score - entry['score'], abs=1e-4)


def test_a_target_has_its_rank(fame):
    recommender, histories = fame
    *history, target = histories[2]
    found = explain(recommender, history, 3, target=target)
    answer = recommender.recommend(history, 40)
    assert found['target']['rank'] == answer.items.index(target) + 1
    assert explain(recommender, history, 3, target=history[0])['target']['rank'] is None
    assert explain(recommender, history, 3, target='nobody knows it')['target'] is None


def test_only_what_is_allowed_is_in_any_list(fame):
    recommender, histories = fame
    allow = recommender.item_ids[1:8]
    allowed_V, _ = recommender.candidates(allow)
    found = explain(recommender, histories[0], 40, allowed_V=allowed_V)
    for entries in (found['recommended'], found['equal_gates'], found['heads'][0]['top']):
        assert {entry['item'] for entry in entries} == set(allow) - set(histories[0])


def test_parts_that_do_not_add_up_are_an_error(fame):
    recommender, histories = fame
    look = recommender.model.look
    wrong = lambda *rows: {**look(*rows), 'gate_BH': 2 * look(*rows)['gate_BH']}  # noqa: E731
    broken = serve.Recommender(
        recommender.model._replace(look=wrong), recommender.item_ids, recommender.count_V
    )
    with pytest.raises(ArithmeticError, match='differ from the score'):
        explain(broken, histories[0], 3)


def test_a_model_without_heads_and_histories_without_items():
    recommender, *_ = make()
    found = explain(recommender, ['a', 'zz', 'b'], 3)
    assert 'heads' not in found and found['unknown'] == ['zz']
    assert all(entry['without'][0] == 0 for entry in found['recommended'])  # the last alone counts
    assert [e['without'] for e in explain(recommender, ['a'], 2)['recommended']] == [None, None]
    found = explain(recommender, ['zz'], 3)
    assert found['fallback'] == 'popularity' and len(found['recommended']) == 3


def test_it_is_told_on_a_terminal(fame):
    recommender, histories = fame
    titles = ['', *(f'\x1b[31mred {n}\n' for n in range(1, recommender.num_items + 1))]
    parts = recommender.model, recommender.item_ids, recommender.count_V, titles
    recommender = serve.Recommender(*parts)
    *history, target = histories[0]
    told = screen.explanation(explain(recommender, [*history, 'zz'], 3, target=target))
    assert '\x1b' not in told and 'Next came' in told and '1 items are not in the' in told
    assert told.count('head 1') == 2 and 'equal gates' in told and 'add up to each score' in told
    told = screen.explanation(explain(make()[0], [], 2))
    assert 'most popular' in told and told.count('\n') == 3


def test_the_tolerance_is_of_the_scores_size():
    assert explain_lib._check_identity(np.array([9, 100.001]), np.array([0, 100.0]), 'float32')
    with pytest.raises(ArithmeticError):
        explain_lib._check_identity(np.array([0, 1.001]), np.array([0, 1.0]), 'float32')
    with pytest.raises(ArithmeticError):
        explain_lib._check_identity(np.array([0, np.nan]), np.array([0, 1.0]), 'float32')
