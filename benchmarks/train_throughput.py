"""Training, evaluation and input, measured in one run on one machine: a table, and JSON beside it.

    python -m benchmarks.train_throughput --dataset=toys --data_dir=DATA --json=FILE

Variants take turns, a few steps at a time, so that a machine that slows down slows all of them;
medians and P10/P90 are of single steps after compilation. Work is XLA's own count, which takes the
body of a loop once and so is too low for losses in chunks; its share is of the rate at which this
device multiplies float32 matrices, measured in the same run. Runs unchanged
on CPU and CUDA.
"""

import argparse
import collections
import dataclasses
import functools
import json
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import config as config_lib
from fame_jax import run as run_lib
from fame_jax import stages, train
from fame_jax.data import sequences
from fame_jax.models.build import build, build_objective, initial
from fame_jax.results import peak_memory


def matmul_rate(size=2048, repeats=10):
    """Floating-point operations a second of a float32 matrix product on this device."""
    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        multiply(a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / np.median(times)


class Variant:
    """One configuration of the training step, ready to be timed; a program for each batch shape.

    An epoch's batches may come in several shapes. Each is timed by itself, and what is told of an
    epoch is summed over its batches. What a model does once before an epoch is no part of it.
    """

    def __init__(self, name, run, model):
        """run: with the data prepared; model: a name, since a run of FAME trains two."""
        self.name = name
        began = time.perf_counter()
        epoch = stages.epochs_of(run, 'finetune')(0)
        batches = list(epoch.batches)
        self.input_seconds = time.perf_counter() - began
        self.num_steps, self.num_histories = epoch.num_steps, epoch.num_histories
        self.weights = sum(float(batch.weights_BL.sum()) for batch in batches)
        self.batches = collections.defaultdict(list)
        for batch in batches:
            self.batches[_shape(batch)].append(batch)
        self._compile(run, model)
        self.times = {shape: [] for shape in self.batches}
        self.scored = self.weighed = 0.0

    def _compile(self, run, model):
        config = run.config
        module = build(model, config, run.data.num_items)
        self.key = jax.random.key(0, impl='rbg' if config.random_bits == 'rbg' else None)
        params = initial(module, self.key)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = train.make_optimizer(config.learning_rate, config.adam_b2, config.weight_decay)
        objective = functools.partial(build_objective(model, config), module)
        step = train.make_step(objective, optimizer)
        self.state = train.State(jnp.int32(0), params, optimizer.init(params))
        began = time.perf_counter()
        self.compiled = {
            shape: step.lower(self.state, batches[0], self.key).compile()
            for shape, batches in self.batches.items()
        }
        self.compile_seconds = time.perf_counter() - began

    def time_steps(self, count):
        """Times single steps, so many of each shape, waiting for each."""
        for shape, batches in self.batches.items():
            times, step = self.times[shape], self.compiled[shape]
            for _ in range(count):
                batch = batches[len(times) % len(batches)]
                began = time.perf_counter()
                self.state, sums = step(self.state, batch, self.key)
                jax.block_until_ready(sums)
                times.append(time.perf_counter() - began)
                self.scored += float(sums[1])
                self.weighed += float(batch.weights_BL.sum())

    def epoch_seconds(self, percentile=50, begin=2, end=None):
        """Seconds of an epoch of such steps; of each shape those timed from begin to end."""
        return sum(
            len(batches) * float(np.percentile(self.times[shape][begin:end], percentile))
            for shape, batches in self.batches.items()
        )

    def terms(self):
        """Terms in an epoch's losses: the weights of its batches, or the share a model scores."""
        return self.weights * self.scored / self.weighed

    def result(self, rate):
        """The figures of the variant."""
        p10, median, p90 = (self.epoch_seconds(p) / self.num_steps for p in (10, 50, 90))
        flops = sum(
            len(batches) * float((self.compiled[shape].cost_analysis() or {}).get('flops', np.nan))
            for shape, batches in self.batches.items()
        )
        flops /= self.num_steps
        memories = [step.memory_analysis() for step in self.compiled.values()]
        return {
            'name': self.name,
            'step_ms': {'p10': 1e3 * p10, 'median': 1e3 * median, 'p90': 1e3 * p90},
            'shapes': len(self.batches),
            'steps_per_epoch': self.num_steps,
            'targets_per_step': self.weights / self.num_steps,
            'terms_per_epoch': self.terms(),
            'parameters': self.num_parameters,
            'epoch_seconds': median * self.num_steps,
            'steps_per_second': 1 / median,
            'tokens_per_second': self.weights / self.num_steps / median,
            'histories_per_second': self.num_histories / self.num_steps / median,
            'compile_seconds': self.compile_seconds,
            'gflop_per_step': flops / 1e9,
            'share_of_matmul_rate': flops / median / rate,
            'temporaries_mb': max(m.temp_size_in_bytes for m in memories) / 1e6
            if all(memories)
            else None,
            'input_share': self.input_seconds / (median * self.num_steps),
        }


def _shape(batch):
    return tuple(field.shape for field in jax.tree.leaves(batch))


def changed(base, **changes):
    """The run with fields of its config changed, over the same data."""
    config = config_lib.Config(**{**vars(base.config), **changes})
    config_lib.check(config)
    return dataclasses.replace(base, config=config)


def variants(base, quick):
    """What is compared; padded rows hold as many targets a step as packed ones."""
    epoch = stages.epochs_of(base, 'finetune')(0)
    targets = sum(float(batch.weights_BL.sum()) for batch in epoch.batches)
    mean = targets / epoch.num_histories
    rows = round(base.config.rows_per_step * base.config.row_length / mean)
    padded = {'packed': False, 'rows_per_step': rows}
    yield 'SASRec packed', 'sasrec', {}
    yield f'SASRec padded to {base.config.max_length}', 'sasrec', padded
    yield 'SASRec packed, plain loss', 'sasrec', {'chunk_tokens': 0}
    yield 'SASRec packed, 256 tokens a chunk', 'sasrec', {'chunk_tokens': 256}
    yield 'SASRec packed, rbg', 'sasrec', {'random_bits': 'rbg'}
    yield 'SASRec packed, bfloat16', 'sasrec', {'dtype': 'bfloat16'}
    yield 'SASRec packed, 2,048 items a chunk', 'sasrec', {'chunk_items': 2048}
    yield 'FAME H 2 N 8 packed', 'fame', {'num_experts': 8}
    yield 'FAME H 2 N 8 packed, plain loss', 'fame', {'num_experts': 8, 'chunk_tokens': 0}
    yield 'FAME H 2 N 8 packed, 256 tokens a chunk', 'fame', {'num_experts': 8, 'chunk_tokens': 256}
    yield f'FAME H 2 N 8 padded to {base.config.max_length}', 'fame', {'num_experts': 8, **padded}
    for experts in (1, 4) if quick else (1, 2, 4, 16, 32):
        yield f'FAME H 2 N {experts} packed', 'fame', {'num_experts': experts}
    for heads in (4,) if quick else (1, 4, 8, 16):
        yield f'FAME H {heads} N 8 packed', 'fame', {'num_experts': 8, 'num_heads': heads}


def time_evaluation(base, model):
    """Seconds to rank all test users in both protocols, after compilation; three times."""
    module = build(model, base.config, base.data.num_items)
    ranks, params = run_lib.ranker(base, module), initial(module, jax.random.key(0))
    ranks(params, 'test')
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ranks(params, 'test')
        times.append(time.perf_counter() - began)
    return {'median': float(np.median(times)), 'all': times}


def _processor():
    try:
        with open('/proc/cpuinfo') as lines:
            return next(line.split(':')[1].strip() for line in lines if 'model name' in line)
    except (OSError, StopIteration):
        return platform.processor()


def table(results):
    """Results as Markdown, each against the first."""
    lines = [
        '| variant | step ms (P10 - P90) | epoch s | against first | targets/s | histories/s | '
        'compile s | GFLOP | of matmul rate | temporaries MB | input |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for r in results:
        step = r['step_ms']
        lines.append(
            f'| {r["name"]} | {step["median"]:.1f} ({step["p10"]:.1f} - {step["p90"]:.1f}) | '
            f'{r["epoch_seconds"]:.2f} | {r["epoch_seconds"] / results[0]["epoch_seconds"]:.2f} | '
            f'{r["tokens_per_second"]:,.0f} | {r["histories_per_second"]:,.0f} | '
            f'{r["compile_seconds"]:.1f} | {r["gflop_per_step"]:.2f} | '
            f'{100 * r["share_of_matmul_rate"]:.0f} % | {r["temporaries_mb"]:.0f} | '
            f'{100 * r["input_share"]:.1f} % |'
        )
    return '\n'.join(lines)


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='synthetic')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--steps', type=int, default=10, help='steps of a variant in each round')
    parser.add_argument('--quick', action='store_true', help='fewer variants')
    parser.add_argument('--json', default='', help='where to write the figures')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_lib.Config(
            dataset=arguments.dataset,
            data_dir=arguments.data_dir,
            workdir=folder,
            progress='none',
            synthetic_users=20_000,
            synthetic_items=12_000,
        )
        base = run_lib.open_run(config)
        stages.prepare(base)
        rate = matmul_rate()
        several = [
            Variant(name, changed(base, **changes), model)
            for name, model, changes in variants(base, arguments.quick)
        ]
        for _ in range(arguments.rounds):
            for variant in several:
                variant.time_steps(arguments.steps)
        results = [variant.result(rate) for variant in several]
        evaluation = {model: time_evaluation(base, model) for model in ('sasrec', 'fame')}
        described = sequences.describe(base.data)
    about = {
        'machine': run_lib.machine() | {'processor': _processor()},
        'dataset': described,
        'matmul_gflops': rate / 1e9,
        'evaluation_seconds': evaluation,
        'peak_resident_mb': peak_memory() / 1e6,
    }
    print(json.dumps(about, indent=2))
    print(table(results))
    if arguments.json:
        with open(arguments.json, 'w') as file:
            json.dump({**about, 'variants': results}, file, indent=2)
            file.write('\n')


if __name__ == '__main__':
    main()
