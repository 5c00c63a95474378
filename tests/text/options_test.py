"""TextOptions: defaults, parsing, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fame_jax.errors import UserError
from fame_jax.text.options import TextOptions


def test_unnamed_options_keep_their_defaults():
    assert TextOptions.parse([]) == TextOptions()
    options = TextOptions.parse(['epochs=3', ' dropout = .2', 'shuffled_labels=True'])
    assert options == TextOptions(epochs=3, dropout=0.2, shuffled_labels=True)
    assert TextOptions.parse(['alternation=sum']).alternation == 'sum'


@given(
    st.builds(
        TextOptions,
        epochs=st.integers(0, 1000),
        learning_rate=st.floats(0, 10),
        dropout=st.floats(0, 0.99),
        alternation=st.sampled_from(['step', 'epoch', 'sum']),
        shuffled_labels=st.booleans(),
        rarest_label=st.integers(1, 1000),
        commonest_label=st.floats(0.001, 1),
    )
)
def test_options_written_as_pairs_are_the_same_options(options):
    pairs = [f'{name}={value}' for name, value in dataclasses.asdict(options).items()]
    assert TextOptions.parse(pairs) == options


@pytest.mark.parametrize(
    ('pairs', 'message'),
    [
        (['epochs'], '--text_options=epochs: write NAME=VALUE'),
        (['epoch=3'], "there is no option 'epoch'; did you mean epochs?"),
        (['xyz=3'], "there is no option 'xyz'; choose from epochs, learning_rate"),
        (['epochs=3', 'epochs=4'], 'epochs is given twice'),
        (['epochs=3.5'], '--text_options=epochs=3.5: write a whole number'),
        (['dropout=much'], '--text_options=dropout=much: write a number'),
        (['shuffled_labels=maybe'], 'write true or false'),
        (['alternation=never'], 'alternation=never: choose from step, epoch, sum'),
        (['epochs=-1'], 'epochs=-1 is out of range; give a value from 0 to'),
        (['dropout=1'], 'from 0 to 0.99'),
        (['temperature=nan'], 'temperature=nan is out of range'),
        (['labels_per_step=1'], 'from 2'),
        (['rarest_label=0'], 'from 1'),
        (['commonest_label=1.1'], 'to 1'),
    ],
)
def test_wrong_pairs_are_refused_in_one_line(pairs, message):
    with pytest.raises(UserError) as error:
        TextOptions.parse(pairs)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'values', [{'epochs': 2.0}, {'epochs': True}, {'shuffled_labels': 1}, {'dropout': '0.1'}]
)
def test_values_of_another_type_are_refused(values):
    with pytest.raises(UserError, match='give '):
        TextOptions(**values)


def test_instance_needs_dropout():
    TextOptions(dropout=0).check_heads(['brand', 'genres'])
    TextOptions(dropout=0.1).check_heads(['brand', 'instance'])
    with pytest.raises(UserError, match='dropout=0 makes the two views of an item equal'):
        TextOptions(dropout=0).check_heads(['brand', 'instance'])
