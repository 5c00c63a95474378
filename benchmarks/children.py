"""Runs as processes: so many at a time, none before what it needs, until a signal stops them."""

import collections
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.runs import Run
from fame_jax import records
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.screen import duration


class Process(Protocol):
    """A child, as subprocess.Popen is one."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int) -> None: ...


def start_child(run: Run, jobs: int) -> subprocess.Popen:
    """Starts a run's process; its screen goes to the log, and what it was to command.json.

    It is a process group of its own, so that a Ctrl-C reaches it once and through us.

    Raises:
      UserError: when the folder cannot be written.
    """
    shared = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if jobs > 1 else {}  # of one GPU's memory
    with explain_os_errors(f'writing {run.log}', 'choose another --folder'):
        run.workdir.mkdir(parents=True, exist_ok=True)
        path = run.workdir / 'command.json'
        jobs = max(jobs, records.read_json(path)['jobs'] if path.is_file() else 1)
        told = shlex.join(run.command[1:]).replace(str(run.workdir.parents[1]), 'FOLDER')
        records.write_json(path, {'command': told, 'jobs': jobs, 'load': os.getloadavg()[0]})
        with run.log.open('ab') as log:
            return subprocess.Popen(
                run.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**shared, **os.environ},
                process_group=0,
            )


def run_all(
    runs: Sequence[Run], jobs: int, start: Callable[[Run, int], Process], pause: float = 0.1
) -> tuple[dict[str, str], signal.Signals | None]:
    """Runs all that is not done, so many at a time, none before what it needs.

    Args:
      runs: backbones before what needs them.
      jobs: how many at a time.
      start: (run, how many run at once) -> its process, as `start_child` has it.
      pause: seconds between looks at the children.

    Returns:
      Name -> why, of those that failed; and the signal that stopped it, if one did.
    """
    waiting = [run for run in runs if not run.done()]
    say(f'runs: {len(runs)}, done before: {len(runs) - len(waiting)}')
    running: dict[Path, tuple[Run, Process, float]] = {}
    failed: dict[str, str] = {}
    stopped = None
    with _signals() as heard:
        while running or (waiting and not stopped):
            while heard:
                stopped = heard.popleft()
                for _, process, _ in running.values():
                    process.send_signal(stopped)
            for run, process, began in list(running.values()):
                if (code := process.poll()) is not None:
                    del running[run.workdir]
                    if not (stopped and code):
                        failed |= _end(run, code, time.monotonic() - began)
            if not stopped:
                _drop_hopeless(waiting, failed)
                for run in _ready(waiting, running)[: jobs - len(running)]:
                    waiting.remove(run)
                    say(f'{run.name}: begins; its screen is in {run.log}')
                    try:
                        running[run.workdir] = run, start(run, jobs), time.monotonic()
                    except UserError as error:
                        failed[run.name] = str(error)
            time.sleep(pause)
    return failed, stopped


@contextlib.contextmanager
def _signals() -> Iterator[collections.deque[signal.Signals]]:
    """The signals that come inside the block, in place of what they would do."""
    heard: collections.deque[signal.Signals] = collections.deque()

    def hear(number: int, _: Any) -> None:
        heard.append(signal.Signals(number))

    before = {n: signal.signal(n, hear) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(waiting: Sequence[Run], running: Mapping[Path, Any]) -> list[Run]:
    """Those whose backbone neither waits nor runs, and so is done."""
    unfinished = {run.workdir for run in waiting} | set(running)
    return [run for run in waiting if run.needs not in unfinished]


def _drop_hopeless(waiting: list[Run], failed: dict[str, str]) -> None:
    """Takes away what waits for a backbone that failed."""
    for run in list(waiting):
        if run.needs and f'{run.needs.parent.name}/{run.needs.name}' in failed:
            waiting.remove(run)
            failed[run.name] = f'not run, since {run.needs.name} failed'


def _end(run: Run, code: int, seconds: float) -> dict[str, str]:
    """Tells how a run ended; its name and why, if it failed."""
    try:
        why = '' if code == 0 and run.done() else _why(run, code)
    except UserError as error:
        why = str(error)
    say(f'{run.name}: {"failed" if why else "done"} after {duration(seconds)}')
    return {run.name: why} if why else {}


def _why(run: Run, code: int) -> str:
    """How a run failed: the last line of its screen says it, if anything does."""
    how = f'killed by {signal.Signals(-code).name}' if code < 0 else f'failed with code {code}'
    how = how if code else 'ended without a verdict'
    lines = run.log.read_text(errors='replace').split('\n') if run.log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), '')
    return f'{how}; {run.log} ends with: {last}' if last else how


def say(line: str) -> None:
    """One line on the screen."""
    print(line, file=sys.stderr, flush=True)
