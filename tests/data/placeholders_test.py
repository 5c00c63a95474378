"""Ids that stand for no id are refused where they are many, and mentioned where they are few."""

import numpy as np
import pytest

from fame_jax.data.placeholders import check_ids
from fame_jax.errors import UserError


def check(counts, role='user'):
    ids = list(counts)
    codes = np.repeat(np.arange(len(ids)), list(counts.values()))
    return check_ids('log.csv', role, codes, ids, 'name another column')


OTHERS = {f'u{n}': 2 for n in range(100)}


@pytest.mark.parametrize('name', ['NA', 'N/A', 'null', 'None', 'nan', '-1', '\\N', 'Anonymous'])
@pytest.mark.parametrize('role', ['user', 'item'])
def test_a_frequent_placeholder_is_refused_with_its_count(name, role):
    with pytest.raises(UserError) as caught:
        check(OTHERS | {name: 20}, role)
    expected = f'log.csv: 20 of 220 records have the {role} {name!r}, which looks like a missing id'
    assert str(caught.value) == f'{expected}; name another column'


@pytest.mark.parametrize(
    'counts',
    [
        OTHERS | {'NA': 19},  # fewer than 10 times the median
        {f'u{n}': 2 for n in range(1000)} | {'NA': 20},  # 20 of 2,020 is less than 1 %
        {'NA': 5, '7': 1},
        {'NA': 6},
    ],
)
def test_a_rare_placeholder_is_a_line_with_its_count(counts):
    (note,) = check(counts)
    total = sum(counts.values())
    assert note.startswith(
        f"{counts['NA']:,} of {total:,} records have the user 'NA'; if it stands"
    )


@pytest.mark.parametrize('name', ['0', '007', '00', 'Nan Goldin', 'nana', 'n', '1e5', '-3'])
def test_other_ids_are_ids(name):
    assert check(OTHERS | {name: 20}) == []


def test_a_user_with_a_large_part_of_the_log_is_a_line():
    (note,) = check(OTHERS | {'shop': 30})
    assert note.startswith("user 'shop' has 13 % of the records")
    assert check(OTHERS | {'shop': 30}, 'item') == []
    assert check(OTHERS | {'shop': 22}) == []  # 9.9 %
    assert check({'only': 500}) == check({'a': 50, 'b': 9}) == []
