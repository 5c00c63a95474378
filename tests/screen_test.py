"""What a person reads at the end of a run, written out."""

import io

import pytest

from fame_jax.screen import Screen, duration, table

RESULTS = {
    'popularity': {
        'masked': {'hr@10': 0.0123, 'ndcg@10': 0.00506},
        'unmasked': {'hr@10': 0.01, 'ndcg@10': 0.004},
    },
    'SASRec': {
        'masked': {'hr@10': 0.1, 'ndcg@10': 0.06254},
        'unmasked': {'hr@10': 1.0, 'ndcg@10': 0.5},
    },
}


def test_a_table_written_out():
    assert table(RESULTS, ['hr@10', 'ndcg@10']).splitlines() == [
        'masked       HR@10  NDCG@10',
        '---------------------------',
        'popularity  0.0123   0.0051',
        'SASRec      0.1000   0.0625',
        '',
        'unmasked     HR@10  NDCG@10',
        '---------------------------',
        'popularity  0.0100   0.0040',
        'SASRec      1.0000   0.5000',
    ]


def test_a_table_of_one_short_name():
    result = {'A': {'unmasked': {'mrr': 0.25, 'hr@5': 0.5}}}
    assert table(result, ['mrr']).splitlines() == [
        'unmasked     MRR',
        '----------------',
        'A         0.2500',
    ]


def test_a_table_of_nothing():
    assert table({}, ['mrr']) == ''


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0, '0.0 s'),
        (4.24, '4.2 s'),
        (59.94, '59.9 s'),
        (60, '1 min 00 s'),
        (185, '3 min 05 s'),
        (119.6, '2 min 00 s'),
        (3599, '59 min 59 s'),
        (3599.7, '1 h 00 min'),
        (7620, '2 h 07 min'),
        (90_000, '25 h 00 min'),
    ],
)
def test_a_duration_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_just_under_a_minute_is_not_sixty_seconds():
    assert duration(59.97) == '1 min 00 s'


def an_epoch(screen):
    screen.say('hello')
    screen.begin('pretrain', 0, 3, 10, 4)
    screen.steps(1, loss='1.0')
    screen.say('meanwhile')
    screen.steps(1, loss='0.5')
    screen.end('pretrain 1/3: loss 0.5')
    screen.close()


def test_lines_are_one_an_epoch():
    file = io.StringIO()
    an_epoch(Screen('lines', file))
    assert file.getvalue() == 'hello\nmeanwhile\npretrain 1/3: loss 0.5\n'


def test_none_is_silent():
    file = io.StringIO()
    an_epoch(Screen('none', file))
    assert file.getvalue() == ''


def test_auto_asks_whether_the_file_is_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert Screen('auto', io.StringIO()).mode == 'lines'
    assert Screen('auto', Terminal()).mode == 'bar'
    assert Screen('lines', Terminal()).mode == 'lines'
    assert Screen('none', Terminal()).mode == 'none'


def test_a_bar_counts_steps_and_goes_away():
    file = io.StringIO()
    screen = Screen('bar', file)
    an_epoch(screen)
    written = file.getvalue()
    assert 'pretrain 1/3' in written and '4/10' in written
    assert written.endswith('pretrain 1/3: loss 0.5\n')


def test_everything_goes_to_stderr(capsys):
    Screen('lines').say('hello')
    assert capsys.readouterr() == ('', 'hello\n')
