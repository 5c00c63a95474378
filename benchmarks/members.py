"""Several seeds in one program: what the step, the epoch and the whole job of more seeds cost.

    python -m benchmarks.members --dataset=toys --data_dir=DATA --out=FILE.json
    python -m benchmarks.members --quick                    a smoke test on small synthetic data

Meant for a GPU, which waits for its launches at the size of one run; it runs on a CPU too. First,
in processes of their own, the whole job of one seed and of five, twice: the second one finds its
compiled programs; and a step with XLA's command buffers off, by default and around loops, where a
version that does not know an option ends its process. Then, in this process, in alternating turns:
a step with the small parameters as arrays of their own and as one (`fame_jax/training/packed.py`),
an epoch of 1, 5 and 16 seeds, and the bytes a second of a step next to those of a copy: its share
of the device's bandwidth is 1 / ratio. A step's bytes are XLA's own count (`bytes accessed`). A row
that fails is reported, the others go on, and the exit code is 1.
"""

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import speed, timing
from benchmarks.speed import Bench, Training
from benchmarks.timing import Case, Record, Row
from fame_jax import run_dir
from fame_jax.errors import UserError
from fame_jax.models import registry
from fame_jax.stages import members as members_stage
from fame_jax.stages import train
from fame_jax.training import step as step_lib
from fame_jax.training.members import stack_members, stack_trees

# Options of XLA for a GPU. A command buffer starts many kernels by one launch.
COMMAND_BUFFERS = {
    'by default': '',
    'off': '--xla_gpu_enable_command_buffer=',
    'around loops too': '--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL',
}
COPY_BYTES = 2**30  # of the array whose copy is timed; a copy reads and writes it


class Members:
    """A stage of several seeds in one program, from random parameters."""

    def __init__(self, bench: Bench, number: int, stage: str = 'pretrain'):
        """Compiles nothing yet; the seeds are 0 to number - 1."""
        self.contexts = [bench.open(f'--seed={seed}') for seed in range(number)]
        self.setups = [train.make_setup(context, stage) for context in self.contexts]
        self.epochs = [
            train.make_epochs(context, setup.module)
            for context, setup in zip(self.contexts, self.setups)
        ]
        self.program = members_stage.Group(self.contexts, stage).program
        first = self.setups[0]  # of which the others differ in their seeds alone
        init = jax.jit(functools.partial(registry.init_params, first.module))
        states = [
            step_lib.init_state(init(setup.key), first.optimizer, None) for setup in self.setups
        ]
        self.state = stack_trees(states)
        self.key = jnp.stack([setup.key for setup in self.setups])
        self.numbers = [jnp.zeros(0, jnp.float32)] * number

    def epoch(self) -> list[dict[str, jax.Array]]:
        """An epoch of all seeds, the layout of their rows included; the sums of each dispatch."""
        batches, sums = [make(0).batches for make in self.epochs], []
        while any(blocks := [list(itertools.islice(of, self.program.size)) for of in batches]):
            stacked = stack_members(blocks, self.numbers)
            self.state, of_block = self.program(self.state, stacked, self.key)
            sums.append(of_block)
        return sums

    def block(self) -> list:
        """The first block of an epoch."""
        blocks = [
            list(itertools.islice(make(0).batches, self.program.size)) for make in self.epochs
        ]
        return stack_members(blocks, self.numbers)


def name_of(number: int) -> str:
    """'1 seed', '5 seeds'."""
    return '1 seed' if number == 1 else f'{number} seeds'


def epoch_case(bench: Bench, number: int) -> Case:
    """Epochs of so many seeds."""
    group = Members(bench, number)
    return Case(group.epoch, sum(make(0).num_histories for make in group.epochs), 'histories')


def step_case(bench: Bench, number: int) -> Case:
    """Steps of so many seeds, by the bytes that they read and write."""
    group = Members(bench, number)
    block = group.block()
    compiled = group.program.precompile(group.state, block[0], group.key).result()
    count = compiled.cost_analysis()['bytes accessed']  # the body of a loop is counted once

    def call() -> Any:
        group.state, sums = group.program(group.state, block, group.key)
        return sums

    return Case(call, count * len(block), 'bytes', len(block))


def copy_case(size: int) -> Case:
    """A copy of an array of so many bytes, which reads and writes it."""
    array = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return Case(lambda: copy(array), 2 * array.nbytes, 'bytes')


def packed_case(bench: Bench, stage: str, packs: bool) -> Case:
    """Steps of one run, its small parameters joined or not."""
    training = Training(bench.open(), stage)
    training.program.packs = packs
    batches = list(itertools.islice(training.make_epoch(0).batches, training.program.size))
    targets = sum(float(batch.weights_BL.sum()) for batch in batches)
    return Case(lambda: training.dispatch(batches), targets, 'targets', len(batches))


def time_jobs(arguments: argparse.Namespace, folder: Path) -> list[Record]:
    """The whole job of the recipe with one seed and with five, compiling and not."""
    flags = ['--dataset=' + arguments.dataset, f'--data_dir={arguments.data_dir}']
    if arguments.quick:
        flags = ['--dataset=synthetic', '--synthetic=users=300,items=200']
        flags += ['--pretrain_epochs=1', '--finetune_epochs=1']
    rows = []
    for seeds in '0', '0,1,2,3,4':
        for state in 'compiling', 'programs compiled before':
            number = len(seeds.split(','))
            name = f'{name_of(number)}, {state}'
            record: Record = {'name': name, 'against': f'1 seed, {state}'}
            workdir = folder / f'job_{len(rows)}'
            argv = [sys.executable, '-m', 'fame_jax.main', '--progress=none', '--members=vmap']
            argv += [*flags, f'--seeds={seeds}', f'--workdir={workdir}']
            argv += [f'--cache_dir={folder}/cache_{number}']
            with timing.errors_recorded(record):
                began = time.perf_counter()
                subprocess.run(argv, check=True, stdout=sys.stderr)
                seconds = time.perf_counter() - began
                record |= timing.spread([seconds]) | {'unit': 'jobs', 'per_second': 1 / seconds}
            rows.append(record)
    return timing.add_ratios(rows)


def time_step(arguments: argparse.Namespace, folder: Path) -> Record:
    """A step of SASRec in this process."""
    bench = Bench(arguments.dataset, arguments.data_dir, folder, arguments.quick)
    packs = jax.default_backend() == 'gpu'  # as in training
    make = functools.partial(packed_case, bench, 'pretrain', packs)
    (record,) = timing.measure([Row('step', 'step', make)], min(bench.turns, 5), bench.seconds)
    if 'failed' in record:
        raise SystemExit(record['failed'])
    return record


def step_command(arguments: argparse.Namespace) -> list[str]:
    """The command of a process that times a step."""
    argv = [sys.executable, '-m', 'benchmarks.members', '--only_step']
    argv += [f'--dataset={arguments.dataset}', f'--data_dir={arguments.data_dir}']
    return argv + ['--quick'] * arguments.quick


def time_command_buffers(arguments: argparse.Namespace) -> list[Record]:
    """A step of SASRec with each of `COMMAND_BUFFERS`, each in a process of its own."""
    argv = step_command(arguments)
    rows, flags = [], os.environ.get('XLA_FLAGS', '')
    for name, option in COMMAND_BUFFERS.items():
        record: Record = {'name': f'command buffers {name}'}
        with timing.errors_recorded(record):
            environment = {**os.environ, 'XLA_FLAGS': f'{flags} {option}'.strip()}
            done = subprocess.run(argv, env=environment, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [''])[-1]
                raise RuntimeError(f'exit code {done.returncode}: {reason}')
            measured = json.loads(done.stdout.splitlines()[-1])
            record = measured | record
        rows.append(record | {'against': 'command buffers by default'})
    return timing.add_ratios(rows)


def sections(bench: Bench, numbers: Sequence[int]) -> dict[str, list[Record]]:
    """What is timed in this process, by the names of the table's sections."""

    def measure(rows: Sequence[Row]) -> list[Record]:
        return timing.measure(rows, min(bench.turns, 5), bench.seconds)

    def of_numbers(case: Callable[[Bench, int], Case], against: str = '1 seed') -> list[Row]:
        return [Row(name_of(n), against, functools.partial(case, bench, n)) for n in numbers]

    steps = [
        Row(f'{name}, {how}', f'{name}, apart', functools.partial(packed_case, bench, stage, packs))
        for name, stage in (('SASRec', 'pretrain'), ('FAME', 'finetune'))
        for how, packs in (('apart', False), ('joined', True))
    ]
    copy = Row('copy', 'copy', functools.partial(copy_case, 2**20 if bench.quick else COPY_BYTES))
    return {
        'a step, small parameters apart or joined': measure(steps),
        'an epoch of SASRec': measure(of_numbers(epoch_case)),
        'bytes of a step of SASRec': measure([copy, *of_numbers(step_case, 'copy')]),
    }


def parse_numbers(text: str) -> list[int]:
    """Numbers of seeds such as '1,5,16', with 1, with which the others are compared.

    Raises:
      ArgumentTypeError: for another text.
    """
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of numbers such as 1,5,16')
    return sorted({1, *map(int, text.split(','))})


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--dataset', default='toys', help='as of fame_jax.main')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--out', type=Path, help='write the figures to this .json')
    parser.add_argument('--seeds', default=[1, 5, 16], type=parse_numbers, help='how many at once')
    parser.add_argument('--only_step', action='store_true', help='a step of SASRec, as JSON')
    parser.add_argument('--quick', action='store_true', help='a smoke test on synthetic data')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes; 1 where a row failed, 2 for a mistake of the user."""
    arguments = parse_arguments(argv)
    numbers = [1, 2] if arguments.quick else arguments.seeds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only_step:
            print(json.dumps(time_step(arguments, folder)))
            return 0
        # Before this process takes the device's memory.
        jobs, buffers = time_jobs(arguments, folder), time_command_buffers(arguments)
        result: Record = {'machine': timing.describe_machine(), 'quick': arguments.quick}
        try:
            bench = Bench(arguments.dataset, arguments.data_dir, folder, arguments.quick)
            result['dataset'] = bench.base.data.describe()
            first = {'the whole job': jobs, 'a step of SASRec': buffers}
            result['sections'] = first | sections(bench, numbers)
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2
    print(speed.markdown(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(arguments.out, result)
    for line in speed.failures(result):
        print(f'failed: {line}', file=sys.stderr)
    return 1 if speed.failures(result) else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
