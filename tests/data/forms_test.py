"""Files called .txt: histories, pairs, or a table; and what is refused."""

import pytest

from fame_jax.data.readers import read_log
from fame_jax.data.sources import open_source
from fame_jax.data.tables import open_table
from fame_jax.errors import UserError

HISTORIES = {
    'blanks': '1 7 8 9\n2 7 9\n',
    'tabs': '1\t7\t8\t9\n2\t7\t9\n',
    'a tab after the user': '1\t7 8 9\n2\t7 9\n',
    'several blanks': ' 1  7 8  9\n2 7 9 \n',
}


def write(folder, content, name='x.txt'):
    path = folder / name
    path.write_text(content)
    return path


@pytest.mark.parametrize('form', HISTORIES)
def test_histories_are_read_as_histories(form, tmp_path):
    path = write(tmp_path, HISTORIES[form])
    assert open_source(path).kind == 'txt'
    log = read_log(path, {})
    assert [(log.user_ids[u], log.item_ids[i]) for u, i in zip(log.users, log.items)] == [
        ('1', '7'), ('1', '8'), ('1', '9'), ('2', '7'), ('2', '9'),
    ]  # fmt: skip


@pytest.mark.parametrize(
    'content',
    [
        '1 7 8 9\n',
        'user_1 item_5 item_7\nuser_2 item_5 item_9\n',
        'ann book game movie\nbob movie book\n',
        'u1 a:b c,d e|f\nu2 x y z\n',  # punctuation inside of ids
        '1 7\n2 8\n3 9\n',  # two fields, but every user once
        'a 7 8 9\nb 9 8 7\n1 9 8 7\n',
        '1 7 8 9\n2 9 8 7\n',  # as many items for every user
        '1\t2\t3\t4\t5\t6\t7\t8\t9\n2\t2\t3\t4\t5\t6\t7\t8\t9\n',
        '\n1 7 8 9\n\n2 9 8 7 6\n',
    ],
)
def test_histories_that_could_be_mistaken(content, tmp_path):
    assert open_source(write(tmp_path, content)).kind == 'txt'


@pytest.mark.parametrize(
    ('content', 'kind', 'columns'),
    [
        ('event_id user_id item_id timestamp\n1 u a 10\n2 u b 20\n', 'blanks',
         ['event_id', 'user_id', 'item_id', 'timestamp']),
        ('event_id\tuser_id\titem_id\n1\tu\ta\n', 'tsv', ['event_id', 'user_id', 'item_id']),
        ('userId,movieId,rating\nu,a,5\n', 'csv', ['userId', 'movieId', 'rating']),
        ('session;item\nu;a\n', 'csv', ['session', 'item']),
        # No usual names, but words above numbers.
        ('nr who what\n1 u a\n2 u b\n', 'blanks', ['nr', 'who', 'what']),
        ('who what when\nu a NA\nv b 3\n', 'blanks', ['who', 'what', 'when']),
        ('who\twhat\twhen\nu\ta\t2020-01-02\n', 'tsv', ['who', 'what', 'when']),
        ('user_id:token item_id:token\nu a\n', 'blanks', ['user_id:token', 'item_id:token']),
        ('{"user": "u", "item": "a"}\n', 'jsonl', ['user', 'item']),
        ("{u'user': u'u', u'item': 'a'}\n", 'jsonl', ['user', 'item']),
        ('u::a::5::10\nu::b::5::20\n', 'dat', ['userId', 'movieId', 'rating', 'timestamp']),
    ],
)  # fmt: skip
def test_tables_called_txt_are_read_as_tables(content, kind, columns, tmp_path):
    source = open_source(write(tmp_path, content))
    assert source.kind == kind
    assert open_table(source, {}).columns == columns


@pytest.mark.parametrize(
    'content', ['1 5\n1 7\n2 5\n', '1\t5\n1\t7\n2\t5\n', '1  5\n1 7 \n\n2 5\n', ' 1 5\n1\t7\n2 5']
)
@pytest.mark.parametrize('columns', [{}, {'user': '1', 'item': '2'}])
def test_pairs_keep_the_order_of_the_file(content, columns, tmp_path):
    path = write(tmp_path, content)
    assert open_source(path).kind == 'pairs'
    log = read_log(path, columns)
    assert [(log.user_ids[u], log.item_ids[i]) for u, i in zip(log.users, log.items)] == [
        ('1', '5'), ('1', '7'), ('2', '5'),
    ]  # fmt: skip
    assert log.times is None and log.card['reader'] == 'pairs'


MIND = '1\tU13740\t11/11/2019 9:05:58 AM\tN551 N427\tN556-1 N357-0\n'


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (MIND + MIND.replace('1\tU', '2\tU'), 'looks like data, not like names of columns'),
        ('1: 5 30 7\n2: 5 7 30\n', "user '1:' ends with a colon"),
        ('1 [5, 30, 7]\n2 [5, 7]\n', 'items in brackets'),
        ('1 [5 30 7]\n2 [5]\n', 'items in brackets'),
        ('[1, 5, 30]\n[2, 5, 7]\n', 'items in brackets'),
        ('1 5,30,7\n2 5,7\n', 'items separated by commas'),
        ('1 5, 30, 7\n2 5, 7\n', 'items separated by commas'),
        ('1, 5, 30, 7\n2, 5, 7\n', 'separated by commas'),
        ('1,5,30,7\n2,5,7\n', 'separated by commas'),
        ('1,5,4,10\n1,7,4,20\n', 'looks like data, not like names of columns'),
        ('1 5 4 10\n1 7 4 20\n', 'looks like data, not like names of columns'),
        ('1\t5\t4\t10\n1\t7\t4\t20\n', 'looks like data, not like names of columns'),
        ('ann tea new\nann cup old\n', 'looks like data, not like names of columns'),
        ('1,5,2020-01-02 10:00:00\n1,7,2020-01-03 10:00:00\n', 'looks like data'),
    ],
)
def test_other_forms_are_refused_in_one_line(content, expected, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_log(path, {})
    message = str(caught.value)
    assert message.startswith(f'{path}, line 1: {expected}') and '\n' not in message
    assert 'write each line as `user item item ...`' in message or '--columns=user:1' in message


def test_a_table_without_header_called_txt_is_read_by_position(tmp_path):
    path = write(tmp_path, '7 u1 a\n8 u1 b\n8 u2 a\n7 u2 c\n')
    log = read_log(path, {'user': '2', 'item': '3', 'time': '1'})
    assert log.user_ids == ['u1', 'u2'] and log.item_ids == ['a', 'b', 'c']
    assert log.times.tolist() == [7, 8, 8, 7]
