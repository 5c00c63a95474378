"""Tables, durations and progress on the terminal, by their text."""

import io
import re
import sys
import threading
import time

import pytest

from fame_jax import screen as screen_module
from fame_jax.screen import Screen, duration, short, table

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


def test_the_text_of_a_table():
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


def test_a_table_without_results_is_empty():
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
def test_a_duration_has_at_most_two_units(seconds, text):
    assert duration(seconds) == text


def test_just_under_a_minute_is_not_sixty_seconds():
    assert duration(59.97) == '1 min 00 s'


def show_epoch(screen):
    screen.say('hello')
    screen.begin('pretrain', 0, 3, 10, 4)
    screen.steps(1, loss='1.0')
    screen.say('meanwhile')
    screen.steps(1, loss='0.5')
    screen.end('pretrain 1/3: loss 0.5')
    screen.close()


def test_lines_mode_prints_one_line_an_epoch():
    file = io.StringIO()
    show_epoch(Screen('lines', file))
    assert file.getvalue() == 'hello\nmeanwhile\npretrain 1/3: loss 0.5\n'


def test_none_mode_prints_nothing():
    file = io.StringIO()
    show_epoch(Screen('none', file))
    assert file.getvalue() == ''


def test_auto_is_a_bar_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert Screen('auto', io.StringIO()).mode == 'lines'
    assert Screen('auto', Terminal()).mode == 'bar'
    assert Screen('lines', Terminal()).mode == 'lines'
    assert Screen('none', Terminal()).mode == 'none'


def test_a_bar_counts_steps_and_is_removed():
    file = io.StringIO()
    screen = Screen('bar', file)
    show_epoch(screen)
    written = file.getvalue()
    assert 'pretrain 1/3' in written and '4/10' in written
    assert written.endswith('pretrain 1/3: loss 0.5\n')


def test_everything_goes_to_stderr(capsys):
    Screen('lines').say('hello')
    assert capsys.readouterr() == ('', 'hello\n')


def test_a_bar_is_shown_in_a_notebook(monkeypatch):
    """A notebook's stderr is not a terminal; its kernel has imported ipykernel."""
    assert Screen('auto', io.StringIO()).mode == 'lines'
    monkeypatch.setitem(sys.modules, 'ipykernel', object())
    assert Screen('auto', io.StringIO()).mode == 'bar'
    assert Screen('none', io.StringIO()).mode == 'none'


# What goes on while nothing else is printed.


@pytest.fixture
def impatient(monkeypatch):
    """Lines appear after .05 s; (file, text) waits until the text is in the file."""
    monkeypatch.setattr(screen_module, 'QUIET', 0.05)

    def wait_for(file, text):
        deadline = time.monotonic() + 20
        while text not in file.getvalue():
            assert time.monotonic() < deadline, file.getvalue()
            time.sleep(0.005)

    yield wait_for
    assert 'screen' not in [thread.name for thread in threading.enumerate()]


def test_a_long_wait_has_lines_with_its_time(impatient):
    file = io.StringIO()
    with Screen('lines', file).waiting('prepare: reading log.csv'):
        impatient(file, 'so far\nprepare')
    lines = file.getvalue().splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert re.fullmatch(r'prepare: reading log\.csv, \d+\.\d s so far', line)


def test_the_innermost_wait_is_named_and_then_the_one_around_it(impatient):
    file = io.StringIO()
    screen = Screen('lines', file)
    with screen.waiting('pretrain'):
        with screen.waiting('pretrain: compiling'):
            impatient(file, 'pretrain: compiling, ')
        impatient(file, 'pretrain, ')


def test_a_wait_that_is_counted_says_how_much_is_done(impatient):
    file = io.StringIO()
    screen = Screen('lines', file)
    with screen.waiting('pretrain'):
        screen.begin('pretrain', 1, 60, 5000, 3)
        screen.steps(8)
        impatient(file, 'pretrain 2/60, steps: 11 of 5,000, ')
        screen.end('pretrain 2/60: loss 1')
        impatient(file, 'pretrain, ')
        for number in screen.count('recommend', range(2), 2):
            if number:
                impatient(file, 'recommend: 1 of 2, ')


def test_a_line_puts_the_next_one_off(monkeypatch):
    monkeypatch.setattr(screen_module, 'QUIET', 0.5)
    file = io.StringIO()
    screen = Screen('lines', file)
    with screen.waiting('slow'):
        for _ in range(20):
            time.sleep(0.02)
            screen.say('word')
    assert file.getvalue() == 'word\n' * 20


def test_a_wait_that_fails_ends_the_lines(impatient):
    file = io.StringIO()
    screen = Screen('lines', file)
    with pytest.raises(ZeroDivisionError), screen.waiting('a'), screen.waiting('b'):
        raise ZeroDivisionError
    with screen.waiting('c'):
        impatient(file, 'c, ')


def test_nothing_is_shown_of_waits_in_none_mode(impatient):
    file = io.StringIO()
    with Screen('none', file).waiting('compiling'):
        time.sleep(0.2)
    assert file.getvalue() == ''


def test_a_terminal_shows_a_wait_at_once_and_removes_it(impatient):
    file = io.StringIO()
    screen = Screen('bar', file)
    with screen.waiting('prepare: reading log.csv'):
        assert 'prepare: reading log.csv [00:00]' in file.getvalue()
        screen.say('4 columns')
        with screen.waiting('compiling'):
            assert 'compiling [00:00]' in file.getvalue().rpartition('4 columns')[2]
    shown = re.split(r'[\r\n]+', file.getvalue())
    assert shown[-1].strip() == ''


def test_the_bar_of_an_epoch_names_the_wait_after_its_steps(impatient):
    file = io.StringIO()
    screen = Screen('bar', file)
    with screen.waiting('pretrain'):
        screen.begin('pretrain', 0, 3, 10, 0)
        screen.steps(10, loss='1.0')
        with screen.waiting('pretrain: validating'):
            assert 'pretrain: validating]' in file.getvalue()
        screen.end('pretrain 1/3: loss 1')
    assert 'pretrain 1/3: loss 1\n' in file.getvalue()


@pytest.mark.parametrize(
    'value, sign, expected',
    [
        (0.0691, '', '.0691'),
        (-0.00004, '', '-.0000'),
        (0.5, '+', '+.5000'),
        (-0.25, '+', '-.2500'),
        (10.5, '', '10.5000'),
        (1, '', '1.0000'),
    ],
)
def test_short_numbers_lose_a_leading_zero_and_no_other(value, sign, expected):
    assert short(value, sign) == expected
