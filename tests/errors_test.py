"""A user's mistake is one line, of a length that can be read."""

import gc
import signal
import sys
import time

import pytest

from fame_jax.errors import UserError, explain_os_errors, resend_lost_interrupts


@pytest.mark.parametrize('length', [0, 1, 999, 1000])
def test_a_message_is_what_was_given(length):
    assert str(UserError('x' * length)) == 'x' * length


@pytest.mark.parametrize('length', [1001, 50_000])
def test_a_very_long_message_keeps_its_place_and_its_advice(length):
    line = str(UserError('runs/a/flags.cfg:3: ' + '[' * length + '; choose from a, b'))
    assert line.startswith('runs/a/flags.cfg:3: [[') and line.endswith('[[; choose from a, b')
    assert ' ... ' in line and len(line) < 1000


def test_errors_of_the_system_name_their_place(tmp_path):
    missing = tmp_path / 'missing'
    with pytest.raises(UserError) as caught, explain_os_errors(f'reading {missing}', 'make it'):
        missing.read_text()
    assert str(caught.value) == f'reading {missing}: No such file or directory; make it'


def test_an_interrupt_in_a_callback_of_the_garbage_collector_comes_once_more():
    """Python prints and ignores what is raised there; the block would go on to its end."""
    handled = []

    def collected(phase, info):
        if not handled:
            handled.append(phase)
            signal.raise_signal(signal.SIGINT)  # raises KeyboardInterrupt here

    before, handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest ignores it
    gc.callbacks.append(collected)
    try:
        with pytest.raises(KeyboardInterrupt), resend_lost_interrupts():
            gc.collect()
            assert handled  # and the interrupt was lost
            time.sleep(20)
    finally:
        gc.callbacks.remove(collected)
        signal.signal(signal.SIGINT, handler)
    assert sys.unraisablehook is before
