"""Explanations: shares that add up, lists by head, and the identity of eq. 11."""

import json

import numpy as np
import pytest
from run_fixtures import (
    GATE_H,
    ITEM_IDS,
    NUM_ITEMS,
    ROUTER_HN,
    histories_of,
    make_fame,
    make_recommender,
    recommender_of,
)

from fame_jax.report import terminal
from fame_jax.serving import explain as explain_lib
from fame_jax.serving.recommender import Recommender

HISTORY = ['a', 'b', 'zz', 'c', 'a', 'd', '7', '007']  # the model encodes the last five


def test_heads_experts_and_attention_by_hand():
    explanation = make_fame().explain(HISTORY, 3)
    assert [entry['item'] for entry in explanation.history] == HISTORY[-5:]
    assert (explanation.unknown, explanation.too_old, explanation.fallback) == (['zz'], 2, '')
    assert [head['share'] for head in explanation.heads] == pytest.approx(GATE_H)
    for head, router_N in zip(explanation.heads, ROUTER_HN):
        assert head['router'] == pytest.approx(router_N)
        np.testing.assert_allclose(head['positions'], [router_N] * 5)
        np.testing.assert_allclose(head['attention'], [[0.2] * 5, [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]])
    # .25 of the first head and .75 of the second, each with its router's weights of the experts.
    all_items, last, first = 0.25 * ROUTER_HN[0] + 0.75 * ROUTER_HN[1]
    expected = [all_items / 5 + at for at in (first, 0, 0, 0, last)]
    assert explanation.carried == pytest.approx(expected)
    assert explanation.identity < 1e-5


def test_lists_of_heads_by_hand():
    """Each head scores by its half of the last item's vector, divided by its gate."""
    recommender = make_fame()
    item_VD = np.asarray(recommender.model.item_VD)
    explanation = recommender.explain(HISTORY, NUM_ITEMS)
    last_D = item_VD[ITEM_IDS.index('007')]
    halves = item_VD[:, :2] @ last_D[:2], item_VD[:, 2:] @ last_D[2:]
    scores = [half / gate for half, gate in zip(halves, GATE_H)]
    lists = [
        *(head['top'] for head in explanation.heads),
        explanation.equal_gates,
        explanation.recommended,
    ]
    for score_V, entries in zip([*scores, sum(scores) / 2, sum(halves)], lists):
        left = [item for item in ITEM_IDS[1:] if item not in HISTORY]
        left.sort(key=lambda item, score_V=score_V: -score_V[ITEM_IDS.index(item)])
        assert [entry['item'] for entry in entries] == left
        expected = [score_V[ITEM_IDS.index(item)] for item in left]
        assert [entry['score'] for entry in entries] == pytest.approx(expected, rel=1e-4)


def test_a_trained_form_of_fame_adds_up(tiny_run):
    """The real intermediates: scores are gated sums over the heads, and shares add up."""
    run, module, params = tiny_run('fame')
    recommender, histories = recommender_of(run, module, params), histories_of(run)
    for history in (histories[0], histories[-1]):
        explanation = recommender.explain(history, 40, filter_seen=False)
        length = len(explanation.history)
        assert sum(head['share'] for head in explanation.heads) == pytest.approx(1)
        assert sum(explanation.carried) == pytest.approx(1)
        for head in explanation.heads:
            router_LN, attention_NL = np.array(head['positions']), np.array(head['attention'])
            assert router_LN.shape == (length, 2) and attention_NL.shape == (2, length)
            np.testing.assert_allclose(router_LN.sum(1), 1, rtol=1e-5)
            np.testing.assert_allclose(attention_NL.sum(1), 1, rtol=1e-5)
            assert head['router'] == head['positions'][-1]  # FAME is read at the last item
        of_head = [{e['item']: e['score'] for e in head['top']} for head in explanation.heads]
        gates = [head['gate'] for head in explanation.heads]
        for entry in explanation.recommended:
            parts = [scores[entry['item']] for scores in of_head]
            assert entry['score'] == pytest.approx(np.dot(gates, parts), abs=1e-4)


def test_the_effect_of_an_item_is_that_of_leaving_it_out():
    recommender = make_fame()
    history = ['a', 'b', 'c', 'b']
    explanation = recommender.explain(history, 2)
    for entry in explanation.recommended:
        for j, change in enumerate(entry['without']):
            rest = history[:j] + history[j + 1 :]
            answer = recommender.recommend(rest, NUM_ITEMS, filter_seen=False)
            score = answer.scores[answer.items.index(entry['item'])]
            assert change == pytest.approx(score - entry['score'], abs=1e-5)
        assert entry['without'][0] == 0 != entry['without'][3]  # the query is the last item's


def test_a_target_has_its_rank():
    recommender = make_fame()
    answer = recommender.recommend(['a', 'b'], NUM_ITEMS)
    assert recommender.explain(['a', 'b'], 1, target=answer.items[3]).target['rank'] == 4
    assert recommender.explain(['a', 'b'], 1, target='a').target['rank'] is None
    assert recommender.explain(['a', 'b'], 1, target='unknown').target is None


def test_a_tie_counts_against_the_target_and_keeps_the_order_of_items():
    """Two items have one vector; none of a history's items is among the ranked ones."""
    recommender, first, second = make_fame(), ITEM_IDS.index('ü'), ITEM_IDS.index('ab')
    model = recommender.model
    item_VD = model.item_VD.at[second].set(model.item_VD[first])
    model = model._replace(item_VD=item_VD, params=item_VD)
    recommender = Recommender(model, ITEM_IDS, recommender.count_V, (), {'model': 'a tie'})
    explanations = [recommender.explain(['a'], NUM_ITEMS, target=t) for t in ('ü', 'ab')]
    score_V = explain_lib.scores(recommender, np.array([ITEM_IDS.index('a')], np.int32))
    at_least = sum(score_V[v] >= score_V[first] for v in range(2, NUM_ITEMS + 1))
    assert [e.target['rank'] for e in explanations] == [at_least] * 2
    heads = [head['top'] for head in explanations[0].heads]
    for entries in (*heads, explanations[0].equal_gates, explanations[0].recommended):
        items = [entry['item'] for entry in entries]
        assert items.index('ab') == items.index('ü') + 1
        scores = [entry['score'] for entry in entries]
        assert scores == sorted(scores, reverse=True)


def test_only_allowed_items_are_in_any_list():
    allow, deny = ITEM_IDS[1:8], ITEM_IDS[2:4]
    explanation = make_fame().explain(['a'], 40, allow=iter(allow), deny=iter(deny))
    for entries in (explanation.recommended, explanation.equal_gates, explanation.heads[0]['top']):
        assert {entry['item'] for entry in entries} == set(allow) - set(deny) - {'a'}


def test_heads_that_do_not_add_up_are_an_error():
    recommender = make_fame()
    right = recommender.model.intermediates

    def wrong(*inputs):
        out = right(*inputs)
        return {**out, 'gate_BH': 2 * out['gate_BH']}

    broken = recommender.model._replace(intermediates=wrong)
    recommender = Recommender(broken, recommender.item_ids, recommender.count_V)
    with pytest.raises(ArithmeticError, match='differ from the scores'):
        recommender.explain(['a'], 3)


def test_the_tolerance_is_relative_to_the_scores():
    check = explain_lib._check_identity
    assert check(np.array([9, 100.001]), np.array([0, 100.0]), 'float32')
    for sums in ([0, 1.001], [0, np.nan]):
        with pytest.raises(ArithmeticError):
            check(np.array(sums), np.array([0, 1.0]), 'float32')


@pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')
def test_a_model_without_heads_and_histories_without_items():
    recommender, *_ = make_recommender()
    explanation = recommender.explain(['a', 'zz', 'b'], 3)
    assert explanation.heads is None and explanation.unknown == ['zz']
    assert all(
        entry['without'][0] == 0 for entry in explanation.recommended
    )  # the query is b's alone
    assert recommender.explain(['a'], 1).recommended[0]['without'] is None
    explanation = recommender.explain(['zz'], 3)
    assert explanation.fallback == 'popularity' and len(explanation.recommended) == 3
    plain = json.loads(explanation.to_json())
    assert plain == explanation.to_dict() and 'heads' not in plain and plain['target'] is None


def test_it_is_printed_on_a_terminal():
    titles = ['', *(f'\x1b[31mred {item}\n' for item in ITEM_IDS[1:])]
    explanation = make_fame(titles=titles).explain(HISTORY, 3, target='ü')
    text = terminal.explanation(explanation.to_dict())
    assert '\x1b' not in text and text.count('head 1') == 2 and 'equal gates' in text
    assert f'red {explanation.recommended[0]["item"]}' in text
