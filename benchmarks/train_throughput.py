"""The training step in its variants, whole epochs, and their input, as the trainer runs them.

A section of benchmarks/suite.py; benchmarks/baselines_throughput.py times its recipes by `Variant`.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.turns import Calls, Effort, contest, time_calls, work
from fame_jax import config as config_lib
from fame_jax import programs, sharding, stages
from fame_jax.models.build import MODELS, build, build_objective, initial
from fame_jax.run import Run

Record = dict[str, Any]

MODELS_TIMED = (('SASRec', 'sasrec'), ('FAME H 2 N 8', 'fame'))


class Variant:
    """One configuration of the training step; a program for each shape that its batches have.

    Each shape is timed by itself, and what is told of an epoch is summed over its batches. What a
    model does once before an epoch is no part of it.
    """

    def __init__(
        self, name: str, run: Run, model: str, compiler_options: dict[str, str] | None = None
    ):
        """run: with the data prepared; model: a name, since a run of FAME trains two."""
        self.compiler_options = compiler_options
        self.name, self.dtype = name, run.config.dtype
        self.epoch_of = stages.epochs_of(run, 'finetune')
        epoch = self.epoch_of(0)
        self.batches = collections.defaultdict(list)
        for batch in epoch.batches:
            self.batches[_shape(batch)].append(batch)
        self.num_steps, self.num_histories = epoch.num_steps, epoch.num_histories
        several = itertools.chain(*self.batches.values())
        self.weights = sum(float(batch.weights_BL.sum()) for batch in several)
        self._compile(run, model)
        self.times = {shape: [] for shape in self.batches}
        self.scored = self.weighed = 0.0

    def _compile(self, run: Run, model: str) -> None:
        config, mesh = run.config, run.mesh
        module = build(model, config, run.data.num_items, mesh)
        self.key = jax.random.key(0, impl='rbg' if config.random_bits == 'rbg' else None)
        params = sharding.born(functools.partial(initial, module), mesh)(self.key)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = programs.make_optimizer(
            config.learning_rate, config.adam_b2, config.weight_decay
        )
        step = programs.make_step(
            functools.partial(build_objective(model, config), module), optimizer
        )
        one = MODELS[model].layout == 'prefixes'
        size = 1 if one else min(config.steps_per_dispatch, self.num_steps)
        self.program = programs.Program(step, size, mesh, self.compiler_options)
        self.state = programs.begin(params, optimizer, mesh)
        began = time.perf_counter()
        self.compiled = {
            shape: self.program.compile(self.state, batches[0], self.key)
            for shape, batches in self.batches.items()
        }
        self.compile_seconds = time.perf_counter() - began

    def take_turn(self, seconds: float) -> None:
        """Times dispatches of each shape, for so long in all and one of each at the least."""
        for shape, batches in self.batches.items():
            blocks, told = _blocks(batches, self.program.size, len(self.times[shape])), []

            def dispatch(blocks: Iterator[list] = blocks, told: list = told) -> Any:
                block = next(blocks)
                self.state, sums = self.program(self.state, block, self.key)
                self.weighed += sum(float(batch.weights_BL.sum()) for batch in block)
                told.append(sums)
                return sums

            times = time_calls(dispatch, seconds / len(self.batches), ahead=True)
            self.times[shape] += [time / self.program.size for time in times]
            self.scored += sum(float(np.asarray(sums)[:, 1].sum()) for sums in told)

    def run_epoch(self) -> None:
        """An epoch as `train.fit` has it, from its layout to its last sums."""
        epoch, pending = self.epoch_of(0), None
        while block := list(itertools.islice(epoch.batches, self.program.size)):
            self.state, sums = self.program(self.state, block, self.key)
            if pending is not None:
                np.asarray(pending)
            pending = sums
        jax.block_until_ready(pending)

    def epoch_seconds(
        self, percentile: float = 50, begin: int = 2, end: int | None = None
    ) -> float:
        """Seconds of an epoch of such steps; of each shape those timed from begin to end."""
        return sum(
            len(batches) * float(np.percentile(_some(self.times[shape], begin, end), percentile))
            for shape, batches in self.batches.items()
        )

    def terms(self) -> float:
        """Terms in an epoch's losses: the weights of its batches, or the share a model scores."""
        return self.weights * self.scored / self.weighed

    def record(self) -> Record:
        """The figures of a step; XLA's counts are of one step, since a block's loop counts once."""
        p10, median, p90 = (self.epoch_seconds(p) / self.num_steps for p in (10, 50, 90))
        return {
            'seconds': {'p10': p10, 'median': median, 'p90': p90},
            'calls': sum(map(len, self.times.values())),
            'per_second': self.weights / self.num_steps / median,
            'histories_per_second': self.num_histories / self.num_steps / median,
            **self._work(),
            'compile_seconds': self.compile_seconds,
            'dtype': self.dtype,
            'shapes': len(self.batches),
            'steps_per_dispatch': self.program.size,
            'steps_per_epoch': self.num_steps,
            'targets_per_step': self.weights / self.num_steps,
            'terms_per_epoch': self.terms(),
            'parameters': self.num_parameters,
            'epoch_seconds': median * self.num_steps,
        }

    def _work(self) -> Record:
        """XLA's counts for the mean step of an epoch, and the most temporaries."""
        works = {shape: work(compiled) for shape, compiled in self.compiled.items()}
        first = next(iter(works.values()))
        found = {'temporaries_bytes': max(w['temporaries_bytes'] or 0 for w in works.values())}
        if any('not_counted' in w for w in works.values()):
            return found | {'not_counted': first.get('not_counted')}
        for what in ('flops', 'bytes'):
            total = sum(len(self.batches[shape]) * w[what] for shape, w in works.items())
            found[what] = total / self.num_steps
        # One of them is the loop over the steps of a dispatch.
        once = sum(w['loops_counted_once'] - 1 for w in works.values())
        return found | {'loops_counted_once': once}


def _shape(batch: Any) -> tuple:
    return tuple(field.shape for field in jax.tree.leaves(batch))


def _some(times: list[float], begin: int, end: int | None) -> list[float]:
    """Those from begin to end, or the last one where there are too few."""
    return times[begin:end] or times[-1:]


def _blocks(batches: list, size: int, start: int) -> Iterator[list]:
    """Blocks of so many batches, over and over, from block `start` on."""
    for number in itertools.count(start):
        yield [batches[(number * size + i) % len(batches)] for i in range(size)]


def changed(base: Run, **changes: Any) -> Run:
    """The run with fields of its config changed, over the same data."""
    config = config_lib.Config(**{**vars(base.config), **changes})
    config_lib.check(config)
    return dataclasses.replace(base, config=config)


def variants(base: Run, quick: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Model and changes of the config by name; each is compared with the first.

    A step has as many targets padded as packed, and what is not named is as Config has it.
    """
    accelerator = jax.default_backend() != 'cpu'
    padded = {'packed': False, 'rows_per_step': _padded_rows(base)}
    rows = (32, 128, 512) if accelerator else (32,) if quick else (32, 128)
    chunks = (128, 512) if accelerator else (512,)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for title, model in MODELS_TIMED:
        found[title] = model, {}
        found[f'{title} plain loss'] = model, {'chunk_tokens': 0}
        found |= {f'{title} {n} rows': (model, {'rows_per_step': n}) for n in rows}
        if model == 'sasrec' or not quick:
            found[f'{title} padded to {base.config.max_length}'] = model, padded
        if quick:
            continue
        found[f'{title} bfloat16'] = model, {'dtype': 'bfloat16'}
        found[f'{title} rbg'] = model, {'random_bits': 'rbg'}
        found |= {f'{title} {n} tokens/chunk': (model, {'chunk_tokens': n}) for n in chunks}
        found |= {f'{title} {n} to a dispatch': (model, {'steps_per_dispatch': n}) for n in (1, 32)}
    found['SASRec 2,048 items/chunk'] = 'sasrec', {'chunk_items': 2048}
    for n in (1, 32) if quick else (1, 2, 4, 16, 32):
        found[f'FAME H 2 N {n}'] = 'fame', {'num_experts': n}
    for n in (8,) if quick else (1, 4, 8, 16):
        found[f'FAME H {n} N 8'] = 'fame', {'num_heads': n}
    if (devices := jax.device_count()) > 1:
        # As many rows to a device as one alone has, and then its table shared too.
        for model in (1, 2, devices) if devices % 2 == 0 else (1, devices):
            data = devices // model
            mesh = {'data_parallel': data, 'model_parallel': model}
            rows = base.config.rows_per_step * data
            found[f'SASRec {data}x{model} devices'] = 'sasrec', mesh | {'rows_per_step': rows}
    if accelerator:
        fast = {'dtype': 'bfloat16', 'random_bits': 'rbg', 'rows_per_step': 512}
        found['FAME H 2 N 8 512 rbg bfloat16'] = 'fame', fast
        whole_epoch = {'steps_per_dispatch': 10_000}
        found |= {f'{t} epoch a dispatch': (m, whole_epoch) for t, m in MODELS_TIMED}
    return found


def command_buffers(base: Run) -> dict[str, tuple[str, dict[str, str]]]:
    """Model and XLA's options by name: launching each kernel by itself, or recording loops too.

    By default XLA records what it may of a program's kernels and launches the record.
    """
    if jax.default_backend() != 'gpu':
        return {}
    flag = 'xla_gpu_enable_command_buffer'
    most = 'FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION'
    ways = {'no CUDA graphs': {flag: ''}, 'loops in graphs': {flag: most}}
    return {f'{t} {way}': (m, options) for t, m in MODELS_TIMED for way, options in ways.items()}


def _padded_rows(base: Run) -> int:
    """Rows of one history each that hold as many targets as a step's packed rows."""
    epoch = stages.epochs_of(base, 'finetune')(0)
    targets = sum(float(batch.weights_BL.sum()) for batch in epoch.batches)
    mean = targets / epoch.num_histories
    return round(base.config.rows_per_step * base.config.row_length / mean)


def time_steps(base: Run, effort: Effort, deadline: float) -> list[Record]:
    """Single steps, in turns of some dispatches."""
    makers = {
        name: functools.partial(_vary, name, base, model, changes)
        for name, (model, changes) in variants(base, effort.quick).items()
    } | {
        name: functools.partial(Variant, name, base, model, options)
        for name, (model, options) in command_buffers(base).items()
    }
    return contest(makers, effort, deadline)


def _vary(name: str, base: Run, model: str, changes: dict[str, Any]) -> Variant:
    return Variant(name, changed(base, **changes), model)


def time_epochs(base: Run, effort: Effort, deadline: float) -> list[Record]:
    """Whole epochs, input included; an epoch is a turn."""

    def make(model: str) -> Calls:
        variant = Variant(model, base, model)
        about = {'items': variant.num_histories, 'compile_seconds': variant.compile_seconds}
        return Calls(variant.run_epoch, warm=not effort.quick, **about)

    makers = {'SASRec': lambda: make('sasrec'), 'FAME H 2 N 8': lambda: make('fame')}
    return contest(makers, effort._replace(rounds=min(effort.rounds, 3), seconds=0), deadline)


def time_input(base: Run, effort: Effort, deadline: float) -> list[Record]:
    """What the host does for an epoch, alone."""
    epoch_of = stages.epochs_of(base, 'finetune')
    steps, size = epoch_of(0).num_steps, base.config.steps_per_dispatch
    batches = list(epoch_of(0).batches)

    def stack() -> None:
        for start in range(0, steps, size):
            programs.stack(batches[start : start + size], size)

    calls = {
        'lay out an epoch': lambda: epoch_of(0),
        'lay out and read its batches': lambda: collections.deque(epoch_of(0).batches, 0),
        'stack them for dispatches': stack,
    }
    makers = {n: functools.partial(Calls, call, items=steps) for n, call in calls.items()}
    return contest(makers, effort, deadline)
