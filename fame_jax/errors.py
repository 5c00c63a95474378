"""The one exception that means: the user can mend this."""

import contextlib
import errno
from collections.abc import Iterator


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and what to do.

    `main` prints it without a traceback and exits with code 2. Anything else that is raised is a
    fault of the program and keeps its traceback.
    """


@contextlib.contextmanager
def explain_os_errors(doing: str, advice: str = '') -> Iterator[None]:
    """Turns the operating system's refusals inside the block into a UserError.

    Args:
      doing: what was tried and where, as in 'writing runs/toys/metrics.jsonl'.
      advice: what to do, where the error itself does not say it.

    Raises:
      UserError: on any OSError (no such file, no permission, disk full, ...).
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = 'free some space there and run the same command again'
        what = error.strerror or str(error)
        raise UserError(f'{doing}: {what}' + (f'; {advice}' if advice else '')) from error
