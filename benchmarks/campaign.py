"""Many models on several data sets within a time limit, and the table of their results.

    python -m benchmarks.campaign --data_dir=DATA --out=FOLDER --minutes=11 --seeds=0,1,2
    python -m benchmarks.campaign --report FOLDER ... --out=TABLES

A job is one model on one data set with all seeds: a command of fame_jax.main. A few worker
processes run one job after another, so that imports and the start of JAX are paid once. The least
finished job comes first. At the time limit the workers get SIGTERM and save; the same command
continues.

  FOLDER/data/DATASET          prepared data
  FOLDER/runs/DATASET/MODEL    the runs, and MODEL.log
  FOLDER/programs              compiled programs
  FOLDER/results.json          jobs (state, flags, seconds) and results of all runs
  FOLDER/ranks_K.npz           test ranks of all users, for the paired tests of the report

FAME's run also trains SASRec, and FAME over BERT4Rec also BERT4Rec, so that these have no job of
their own where it is in the list. Each job takes the flags of experiments/DATASET.cfg, where there
is such a file, but not those that its model does not have or that its recipe sets; --flags wins
over both.
"""

import argparse
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import campaign_results
from benchmarks.campaign_jobs import DATASETS, MODELS, Job, Record, list_jobs, order
from fame_jax.config import flags as config_flags
from fame_jax.errors import ArgumentParser, UserError, explain_os_errors
from fame_jax.stages import members

ROOT = Path(__file__).resolve().parents[1]
WORKER = (sys.executable, '-m', 'benchmarks.campaign', '--worker')
RESERVE = 40.0  # seconds at the end for saving and packing, or a third of the time


class Campaign:
    """Jobs, their states, and the threads that give them to workers.

    Attributes:
      records: name -> state (done, failed, stopped, waiting), flags, left_out, seconds and, of a
        failed job, the last line of its log; those of earlier calls too.
      stopping: True ends the campaign early.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        out: Path,
        data_dir: str = '',
        workers: int = 2,
        command: Sequence[str] = WORKER,
    ):
        """Reads the records of an earlier call; `command` starts a worker."""
        self.out, self.data_dir = out, data_dir
        self.workers, self.command = workers, command
        self.began, self.stopping = time.monotonic(), False
        self.changed = threading.Condition(threading.RLock())
        self.processes: list[subprocess.Popen] = []
        before = (out / 'results.json').exists()
        self.records: dict[str, Record] = campaign_results.read(out)['jobs'] if before else {}
        self.jobs = order(jobs, out, self.records)
        for job in self.jobs:
            record = self.records.setdefault(job.name, {'seconds': 0.0})
            record |= {'state': 'waiting', 'flags': list(job.flags), 'left_out': list(job.left_out)}
            record.pop('line', None)

    def say(self, line: str) -> None:
        """Prints a line with the seconds since the start."""
        print(f'[{time.monotonic() - self.began:6.1f}] {line}', flush=True)

    def run(self, seconds: float) -> bool:
        """Runs the jobs for at most so many seconds, and packs; whether none has failed."""
        reserve = min(RESERVE, seconds / 3)
        threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not self.stopping:
            if time.monotonic() - self.began > seconds - reserve:
                break
            time.sleep(0.05)
        self._stop(threads, reserve / 2)
        for job in self.jobs:
            if self.records[job.name]['state'] == 'running':  # its worker could not be ended
                self.records[job.name]['state'] = 'stopped'
        campaign_results.pack(self.out, self.records)
        states = Counter(self.records[job.name]['state'] for job in self.jobs)
        self.say(
            ', '.join(f'{n} {state}' for state, n in states.items()) or 'nothing is left to do'
        )
        if states['stopped'] or states['waiting']:
            self.say('the same command continues')
        return not states['failed']

    def _stop(self, threads: Sequence[threading.Thread], grace: float) -> None:
        """SIGTERM for the workers that still run, and after so many seconds a kill."""
        with self.changed:
            self.stopping = True
            alive = [process for process in self.processes if process.poll() is None]
        for process in alive:
            process.terminate()
        until = time.monotonic() + grace
        for process in alive:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for thread in threads:
            thread.join(5)

    def _next(self) -> Job | None:
        """The first waiting job whose data are prepared; None: there will be none."""
        with self.changed:
            while not self.stopping:
                waiting = [j for j in self.jobs if self.records[j.name]['state'] == 'waiting']
                for job in waiting:
                    of_data = self.records.get(job.data, {}).get('state', 'done')
                    if job.name == job.data or of_data == 'done':
                        self.records[job.name]['state'] = 'running'
                        return job
                if not waiting:
                    return None
                self.changed.wait(0.2)
        return None

    def _feed(self) -> None:
        """Gives jobs to one worker, and starts another one where it has ended."""
        process = None
        while (job := self._next()) is not None:
            began, log = time.monotonic(), self.out / 'runs' / f'{job.name}.log'
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                process = process or self._start(log)
                argv = job.argv(self.out, self.data_dir)
                process.stdin.write(json.dumps({'argv': argv, 'log': str(log)}) + '\n')
                process.stdin.flush()
                code = json.loads(process.stdout.readline())['code']
            except (OSError, ValueError):  # the worker has ended
                code = process.wait() if process else 1
            process = process if 0 <= code < 128 and process.poll() is None else None
            self._finish(job, code, log, time.monotonic() - began)
        if process is not None:
            process.stdin.close()
            process.wait()

    def _start(self, log: Path) -> subprocess.Popen:
        env = {
            'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # workers share the device
            'JAX_COMPILATION_CACHE_DIR': str(self.out / 'programs'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
            **os.environ,
            'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
        }
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        with self.changed, log.open('ab') as errors:
            if self.stopping:
                raise OSError('no more workers')
            self.processes.append(subprocess.Popen(self.command, stderr=errors, env=env, **pipes))
            return self.processes[-1]

    def _finish(self, job: Job, code: int, log: Path, seconds: float) -> None:
        """Records the end of a job, and says it."""
        with self.changed:
            record = self.records[job.name]
            by_signal = code in (128 + signal.SIGTERM, 128 + signal.SIGINT) or self.stopping
            record['state'] = 'done' if not code else 'stopped' if by_signal else 'failed'
            record['seconds'] = round(record['seconds'] + seconds, 1)
            line = ''
            if record['state'] == 'failed':
                text = log.read_text(errors='replace').strip() if log.exists() else ''
                line = f'exit code {code}; {text.splitlines()[-1][:500] if text else "no output"}'
                record['line'] = line
                for other in self.jobs if job.name == job.data else ():
                    if other.data == job.name and other != job:
                        self.records[other.name] |= {'state': 'failed', 'line': f'no data: {line}'}
            self.changed.notify_all()
        self.say(f'{job.name}: {record["state"]}, {seconds:.0f} s{line and ", "}{line}')


def work() -> None:
    """A worker: reads a job a line, runs it in this process, and answers with its exit code."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    import jax

    from fame_jax.main import main as run

    for line in sys.stdin:
        job = json.loads(line)
        with open(job['log'], 'ab') as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            code = run(job['argv'])
        except Exception:  # the other jobs go on
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        jax.clear_caches()
        gc.collect()
        print(json.dumps({'code': code}), file=answers, flush=True)
        if code > 128:
            return


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      UserError: for arguments that do not fit.
    """
    parser = ArgumentParser(
        prog='python -m benchmarks.campaign',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--data_dir', default='', help='as of fame_jax.main')
    parser.add_argument('--out', type=Path, help='folder of the campaign, or of the tables')
    parser.add_argument('--minutes', type=float, default=60, help='the whole call takes at most')
    parser.add_argument('--seeds', default='0,1,2', help='as of fame_jax.main')
    parser.add_argument('--datasets', default=','.join(DATASETS), help='as of --dataset')
    parser.add_argument('--models', default=','.join(MODELS), help='of --model, and two variants')
    parser.add_argument('--only', default='', help='regular expression of DATASET/MODEL')
    parser.add_argument('--workers', type=int, default=2, help='processes')
    parser.add_argument('--flags', default='', help='more flags of all jobs, in one argument')
    parser.add_argument('--dry_run', action='store_true', help='print the commands, run nothing')
    parser.add_argument('--report', nargs='+', type=Path, metavar='FOLDER', help='make the tables')
    arguments = parser.parse_args(argv)
    try:
        arguments.flags = shlex.split(arguments.flags)
    except ValueError as error:
        raise UserError(f'--flags={arguments.flags}: {error}') from error
    if not arguments.report and not arguments.out:
        raise UserError('--out=FOLDER is needed')
    if not (arguments.minutes > 0 and arguments.workers > 0):
        raise UserError('--minutes and --workers must be above 0')
    return arguments


def main(argv: Sequence[str]) -> int:
    """Runs a campaign or makes its tables; 1 where a job failed, 2 for a mistake of the user."""
    if '--worker' in argv:
        work()
        return 0
    try:
        arguments = parse_arguments(argv)
        if arguments.report:
            campaign_results.report(arguments.report, arguments.out)
            return 0
        members.parse_seeds(config_flags.parse([f'--seeds={arguments.seeds}']))
        chosen = [s.split(',') for s in (arguments.models, arguments.datasets)]
        jobs = list_jobs(*chosen, arguments.seeds, arguments.flags, arguments.only)
        out = arguments.out.resolve()
        if arguments.dry_run:
            for job in order(jobs, out, {}):
                command = ['python', '-m', 'fame_jax.main', *job.argv(out, arguments.data_dir)]
                without = f'  # without {" ".join(job.left_out)}' if job.left_out else ''
                print(shlex.join(command) + without)
            return 0
        with explain_os_errors(f'making the folder {out}', 'choose another --out'):
            out.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(jobs, out, arguments.data_dir, arguments.workers)

        def stop(number: int, frame: Any) -> None:
            campaign.stopping = True

        handlers = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            return 0 if campaign.run(60 * arguments.minutes) else 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
