"""The printed explanation has the list, the past items behind it, and each head's list."""

from report_fixtures import make_explanation

from fame_jax.report import terminal


def test_an_explanation_of_heads():
    explained = make_explanation(heads=2, experts=2, length=3)
    explained['recommended'][0]['without'] = [0.5, -1.25, 0.0]
    explained['heads'][1]['positions'][2] = [0.75, 0.25]
    explained['carried'] = [0.2, 0.3, 0.5]
    explained |= {'unknown': ['zz'], 'too_old': 4}
    lines = [line.split() for line in terminal.explanation(explained).splitlines()]
    assert ['1', 'one', '9.00', 'two', '(-1.25)'] in lines
    assert ['1', 'five', 'five', 'one'] in lines  # head 1, head 2, equal gates
    (last,) = [line for line in lines if line[:2] == ['three', '50%']]
    assert last[-2:] == ['0.75', '0.25']
    text = terminal.explanation(explained)
    assert 'Next item: three, rank 3.' in text and '1 items' in text and '4 items' in text
    assert '1e-07' in text


def test_an_explanation_without_heads_target_or_removed_items():
    explained = make_explanation(heads=0, length=1) | {'target': None}
    lines = terminal.explanation(explained).splitlines()
    assert [line.split() for line in lines[2:]] == [
        [str(n + 1), name, f'{9 - n:.2f}']
        for n, name in enumerate(['one', 'two', 'three', 'four', 'five'])
    ]


def test_the_most_popular_items_of_a_fallback():
    explained = make_explanation(heads=0, length=0) | {'fallback': 'popularity', 'target': None}
    assert terminal.explanation(explained).split()[:3] == ['most', 'popular', 'actions']
