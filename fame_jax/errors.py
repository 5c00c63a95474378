"""Ends of a command that are no fault of the program: mistakes of the user, and signals."""

import _thread
import argparse
import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

RESEND_SECONDS = 0.05  # long enough for the callback that lost an interrupt to return


class UserError(Exception):
    """A mistake of the user's, in one line: what is wrong, where, and what to do.

    `main` prints the line without a traceback and exits with code 2. Every other exception is a
    fault of the program and keeps its traceback. A message of over a thousand characters, which
    repeats a damaged file, keeps its start (where) and its end (what to do).
    """

    def __init__(self, message: str):
        if len(message) > 1000:
            message = f'{message[:600]} ... {message[-300:]}'
        super().__init__(message)


class DivergedError(UserError):
    """A loss or a score is not finite, so that these settings cannot be trained further."""


class Interrupted(Exception):
    """Training stopped because of a signal; its state is saved."""

    def __init__(self, number: int, stage: str, step: int):
        """Names the signal by its number, and the stage and step that are saved."""
        super().__init__(f'{signal.Signals(number).name} in {stage}: saved at step {step}')
        self.number = number


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{self.prog}: {message}; see {self.prog} --help')


@contextlib.contextmanager
def resend_lost_interrupts() -> Iterator[None]:
    """Inside the block a KeyboardInterrupt that Python ignored comes once more.

    Python prints and ignores one that is raised in a callback of the garbage collector, of which
    JAX has one, or in a `__del__`: without this the command would go on to its end.
    """
    before = sys.unraisablehook

    def resend(lost: 'sys.UnraisableHookArgs') -> None:
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(RESEND_SECONDS, _thread.interrupt_main).start()
        else:
            before(lost)

    sys.unraisablehook = resend
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def explain_os_errors(doing: str, advice: str = '') -> Iterator[None]:
    """Turns an OSError inside the block into a UserError.

    Args:
      doing: the action and the path, such as 'writing runs/toys/metrics.jsonl'.
      advice: what to do about it, where the system's message does not say so.

    Raises:
      UserError: on any OSError (no such file, no permission, disk full, ...).
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = 'free some space there and run the same command again'
        reason = error.strerror or str(error)
        raise UserError(f'{doing}: {reason}' + (f'; {advice}' if advice else '')) from error
