"""Speed of training, evaluation and the loss on this machine, as one table and as JSON.

    python -m benchmarks.speed --dataset=toys --data_dir=DATA --out=FOLDER
    python -m benchmarks.speed --only=step,loss             some sections
    python -m benchmarks.speed --quick                      a smoke test on small synthetic data
    python -m benchmarks.speed --goals --data_dir=DATA      four goals; needs Toys and Sports

The rows of a section run in alternating turns, so that other load on the machine slows them alike.
A time is the median over the turns, with minimum and maximum, after compilation. A ratio is the
time for an amount of work, divided by that of the row in the column `against` in the same run. A
row that fails is reported, the others go on, and the exit code is 1. Runs on CPU and GPU.
"""

import argparse
import contextlib
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import large_catalogue, timing
from benchmarks.timing import Case, Record, Row
from fame_jax import losses, run_dir, stages
from fame_jax.config import flags as config_flags
from fame_jax.data import epochs
from fame_jax.errors import UserError
from fame_jax.models import registry
from fame_jax.stages import RunContext, train
from fame_jax.training import loop, step


class Variant(NamedTuple):
    """A training step: its stage, more flags, the row it is compared with, and its rows."""

    stage: str
    flags: str
    against: str
    packed: bool = True  # False: one history a row, padded to max_length


STEPS = {
    'SASRec': Variant('pretrain', '', 'SASRec'),
    'FAME': Variant('finetune', '', 'SASRec'),
    'SASRec, plain loss': Variant('pretrain', '--loss_chunk=0,0', 'SASRec'),
    # 91 histories have as many targets as the 8 packed rows of a step on Toys.
    'SASRec, one history a row': Variant('pretrain', '--rows_per_step=91', 'SASRec', packed=False),
    'SASRec, 32 rows': Variant('pretrain', '--rows_per_step=32', 'SASRec'),
    'SASRec, 128 rows': Variant('pretrain', '--rows_per_step=128', 'SASRec'),
    'SASRec, bfloat16': Variant('pretrain', '--dtype=bfloat16', 'SASRec'),
    'FAME, plain loss': Variant('finetune', '--loss_chunk=0,0', 'FAME'),
    'FAME, 32 rows': Variant('finetune', '--rows_per_step=32', 'FAME'),
}
RECIPE = 'FAME H 2 N 8'
EXPERTS = {RECIPE: Variant('finetune', '', RECIPE)}
for _n in (1, 2, 4, 16, 32):
    EXPERTS[f'FAME H 2 N {_n}'] = Variant('finetune', f'--num_experts={_n}', RECIPE)
for _h in (1, 4, 8, 16):
    EXPERTS[f'FAME H {_h} N 8'] = Variant('finetune', f'--num_heads={_h}', RECIPE)
for _name, _options in ('two active', 'routing=inputs,active_experts=2'), ('remat', 'remat=true'):
    for _of in (RECIPE, 'FAME H 2 N 32', 'FAME H 16 N 8'):
        _flags = f'{EXPERTS[_of].flags} --model_options={_options}'
        EXPERTS[f'{_of}, {_name}'] = Variant('finetune', _flags, _of)
MODELS = {'SASRec': 'pretrain', 'FAME': 'finetune'}  # and the stage that trains each
LOSS_TOKENS = {'cpu': 512}  # of a step; 16,384 on other devices


class Training:
    """A stage in training, as the training loop runs it, from random parameters."""

    def __init__(self, context: RunContext, stage: str, packed: bool = True):
        setup = train.make_setup(context, stage)
        self.module, self.program, self.key = setup.module, setup.program, setup.key
        self.make_epoch = train.make_epochs(context, setup.module)
        if not packed:
            self.make_epoch = functools.partial(unpacked_epoch, context)
        params = registry.init_params(setup.module, setup.key)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.state = step.init_state(params, setup.optimizer, context.mesh)

    def dispatch(self, block: list) -> dict[str, jax.Array]:
        """Several steps; the sums of each: 'loss', 'weight' and the model's own, [steps] each."""
        self.state, sums = self.program(self.state, block, self.key)
        return sums

    def epoch(self) -> list[dict[str, jax.Array]]:
        """All steps of an epoch, the layout of its rows included; the sums of each dispatch."""
        batches = self.make_epoch(0).batches
        blocks = iter(lambda: list(itertools.islice(batches, self.program.size)), [])
        return [self.dispatch(block) for block in blocks]


def unpacked_epoch(context: RunContext, epoch: int) -> loop.Epoch:
    """An epoch with one history a row."""
    config, windows = context.config, train.make_windows(context)
    batches, num_steps = epochs.epoch_batches(
        windows,
        seed=config.run.seed,
        epoch=epoch,
        row_length=config.data.max_length,
        rows_per_step=config.training.rows_per_step,
        packed=False,
    )
    return loop.Epoch(batches, num_steps, len(windows.starts))


def step_case(context: RunContext, variant: Variant) -> Case:
    """Dispatches of several steps, over the first batches of an epoch."""
    training = Training(context, variant.stage, variant.packed)
    size = training.program.size
    batches = list(itertools.islice(training.make_epoch(0).batches, 8 * size))
    blocks = [batches[i : i + size] for i in range(0, len(batches) - size + 1, size)]
    targets = sum(float(batch.weights_BL.sum()) for block in blocks for batch in block)
    turn = itertools.cycle(blocks)
    compiled = training.program.precompile(training.state, batches[0], training.key).result()
    return Case(
        lambda: training.dispatch(next(turn)),
        targets / len(blocks),
        'targets',
        size,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def epoch_case(context: RunContext, stage: str) -> Case:
    """Whole epochs."""
    training = Training(context, stage)
    return Case(training.epoch, training.make_epoch(0).num_histories, 'histories')


def evaluation_case(context: RunContext, stage: str) -> Case:
    """The ranks of all test users by both protocols."""
    ranker, module = context.ranker(stage), context.module(stage)
    params = registry.init_params(module, jax.random.key(0))
    return Case(lambda: ranker(params, 'test'), context.data.num_users, 'users')


def loss_case(function: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> Case:
    """One form of the loss."""
    compiled = jax.jit(function).lower(*arrays).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Case(lambda: compiled(*arrays), len(arrays[0]), 'tokens', temporaries=temporaries)


def loss_forms() -> dict[str, Callable[..., Any]]:
    """The forms of the cross-entropy over the catalogue by name, value and both gradients."""

    def value(*arrays: jax.Array, **chunks: int) -> jax.Array:
        return losses.cross_entropy(*arrays, **chunks)[0]

    def form(tokens: int, items: int) -> Callable[..., Any]:
        chunked = functools.partial(value, chunk_tokens=tokens, chunk_items=items)
        return jax.value_and_grad(chunked, argnums=(0, 1))

    return {
        'plain': form(0, 0),
        'plain, value only': value,
        'only its three products': products,
        'chunks of 128 tokens': form(128, 0),
        'chunks of 2,048 tokens': form(2048, 0),
        'chunks of 2,048 items': form(0, 2048),
        'chunks of 512 tokens x 2,048 items': form(512, 2048),
    }


def products(
    query_TD: jax.Array, item_VD: jax.Array, target_T: jax.Array, weight_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The three matrix products that no exact gradient can avoid, and nothing else."""
    logit_TV = jax.lax.optimization_barrier(query_TD @ item_VD.T)
    return logit_TV @ item_VD, query_TD.T @ logit_TV


def loss_arrays(tokens: int, num_items: int, width: int) -> tuple[jax.Array, ...]:
    """Queries and a table like those of a cosine similarity at temperature .07; 5 % padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    query_TD = jax.random.normal(keys[0], (tokens, width))
    item_VD = jax.random.normal(keys[1], (num_items + 1, width))
    query_TD /= 0.07 * jnp.linalg.norm(query_TD, axis=1, keepdims=True)
    item_VD /= jnp.linalg.norm(item_VD, axis=1, keepdims=True)
    target_T = jax.random.randint(keys[2], (tokens,), 1, num_items + 1)
    return query_TD, item_VD, target_T, (jax.random.uniform(keys[3], (tokens,)) > 0.05) * 1.0


class Bench:
    """A prepared data set, and the number and length of turns."""

    def __init__(self, dataset: str, data_dir: str, folder: Path, quick: bool):
        """Prepares the data in the folder; quick: a small synthetic data set instead."""
        self.folder, self.quick = folder, quick
        self.turns, self.seconds = (1, 0.1) if quick else (9, 0.5)
        self.data_flags = [f'--dataset={dataset}', f'--data_dir={data_dir}']
        if quick:
            self.data_flags = ['--dataset=synthetic', '--synthetic=users=300,items=200']
        self.base = self._open('data', *self.data_flags)
        stages.STAGES['prepare'](self.base)
        self._number = itertools.count()

    def _open(self, name: str, *flags: str) -> RunContext:
        given = config_flags.parse([*flags, '--progress=none', f'--workdir={self.folder}/{name}'])
        return stages.open_run(given)

    def open(self, flags: str = '') -> RunContext:
        """A new run on the prepared data."""
        prepared = f'--prepared={self.folder}/data'
        return self._open(str(next(self._number)), prepared, *flags.split())

    def steps(self, variants: Mapping[str, Variant]) -> list[Record]:
        """Training steps."""

        def make(variant: Variant) -> Case:
            return step_case(self.open(variant.flags), variant)

        rows = [Row(n, v.against, functools.partial(make, v)) for n, v in variants.items()]
        return timing.measure(rows[:2] if self.quick else rows, self.turns, self.seconds)

    def models(self, case: Callable[[RunContext, str], Case]) -> list[Record]:
        """FAME compared with SASRec."""
        make = functools.partial(case, self.open())
        rows = [Row(name, 'SASRec', functools.partial(make, s)) for name, s in MODELS.items()]
        return timing.measure(rows, min(self.turns, 5), 0)

    def losses(self) -> list[Record]:
        """The loss in chunks compared with the plain one."""
        tokens = LOSS_TOKENS.get(jax.default_backend(), 16_384)
        arrays = loss_arrays(tokens, self.base.data.num_items, 64)
        rows = [
            Row(name, 'plain', functools.partial(loss_case, function, arrays))
            for name, function in loss_forms().items()
        ]
        return timing.measure(rows[:2] if self.quick else rows, self.turns, self.seconds)

    def job(self, num_epochs: int | None = None) -> list[Record]:
        """A whole run from data to metrics, twice: the second one reads its compiled programs.

        Args:
          num_epochs: of each training stage; None: those of the recipe, with early stopping.
        """
        names = 'whole job, compiling', 'whole job, programs compiled before'
        limits = [f'--{s}_epochs={1 if self.quick else num_epochs}' for s in MODELS.values()]
        flags = [*self.data_flags, *(limits if self.quick or num_epochs else [])]
        before = jax.config.jax_compilation_cache_dir
        compilation_cache.reset_cache()  # JAX opens a cache once, the one of the first compilation
        rows = []
        for name in names:
            record = {'name': name, 'against': names[0]}
            with timing.errors_recorded(record):
                workdir = f'job_{len(rows)}'
                context = self._open(workdir, *flags, f'--cache_dir={self.folder}/cache')
                record['stages'], record['test'] = run_all(context)
                seconds = sum(record['stages'].values())
                record |= timing.spread([seconds]) | {'unit': 'jobs', 'per_second': 1 / seconds}
            rows.append(record)
        jax.config.update('jax_compilation_cache_dir', before)
        compilation_cache.reset_cache()
        return timing.add_ratios(rows)


def run_all(context: RunContext) -> tuple[dict[str, float], Record]:
    """Every stage of a run: seconds of each, and the test metrics of each trained stage."""
    seconds = {}
    with contextlib.closing(context), contextlib.redirect_stdout(sys.stderr):
        for stage in context.config.run.stages:
            began = time.perf_counter()
            stages.STAGES[stage](context)
            seconds[stage] = time.perf_counter() - began
    results = run_dir.read_json(context.folder / 'results.json')['results']
    return seconds, {stage: results[stage]['test'] for stage in MODELS.values()}


SECTIONS: dict[str, Callable[[Bench], list[Record]]] = {
    'step': lambda bench: bench.steps(STEPS),
    'epoch': lambda bench: bench.models(epoch_case),
    'evaluation': lambda bench: bench.models(evaluation_case),
    'loss': lambda bench: bench.losses(),
    'experts': lambda bench: bench.steps(EXPERTS),
    # An accelerator trains the whole recipe in less time than a CPU two epochs.
    'job': lambda bench: bench.job(2 if jax.default_backend() == 'cpu' else None),
}


def catalogue_step(bench: Bench) -> Record:
    """A step of ten million items: the temporaries in addition to the gradient, in GB."""
    # A CPU would take minutes for more tokens, and an accelerator for smaller blocks.
    on_cpu = jax.default_backend() == 'cpu'
    tokens, chunks = (256, (256, 1024)) if on_cpu else (4096, (4096, 16_384))
    items = 20_000 if bench.quick else 10_000_000
    record = large_catalogue.time_step('chunks of items', items, tokens, chunks)
    return record | {'reached': (record['temporaries_bytes'] - record['table_bytes']) / 1e9}


def last_median(rows: list[Record]) -> Record:
    """The last row's median, and all rows; the first error where a row failed."""
    failed = [record['failed'] for record in rows if 'failed' in record]
    if failed:
        return {'failed': failed[0]}
    return {'reached': rows[-1]['seconds']['median'], 'rows': rows}


class Goal(NamedTuple):
    """A goal: its description, its data set, the most that reaches it, and the measurement."""

    title: str
    dataset: str
    most: float
    unit: str
    reach: Callable[[Bench], Record]


GOALS = {
    'epoch': Goal(
        *('an epoch of FAME H 2 N 8', 'toys', 0.5, 's'),
        lambda bench: last_median(bench.models(epoch_case)),
    ),
    'evaluation': Goal(
        *('all test users by both protocols', 'sports', 0.2, 's'),
        lambda bench: last_median(bench.models(evaluation_case)),
    ),
    'step': Goal(
        *('a step of 10 million items: temporaries in addition to the gradient', 'toys', 2, 'GB'),
        catalogue_step,
    ),
    'job': Goal(
        *('the whole job, programs compiled before', 'toys', 60, 's'),
        lambda bench: last_median(bench.job()),
    ),
}


def reach_goals(arguments: argparse.Namespace, folder: Path) -> dict[str, Record]:
    """Measures every goal; one that fails has `failed`."""
    goals = {}
    for name in arguments.only or GOALS:
        print(f'speed: goal {name}', file=sys.stderr, flush=True)
        goal = GOALS[name]
        bench = Bench(goal.dataset, arguments.data_dir, folder / name, arguments.quick)
        goals[name] = {'title': f'{goal.dataset}: {goal.title}'}
        goals[name] |= {'most': goal.most, 'unit': goal.unit}
        with timing.errors_recorded(goals[name]):
            goals[name] |= goal.reach(bench)
    return goals


def markdown(result: Mapping[str, Any]) -> str:
    """The machine in a line, then one table of all sections, or of the goals."""
    lines = [timing.headline(result['machine']), '']
    if result['quick']:
        lines += ['Small synthetic data and short turns: these figures mean nothing.', '']
    if 'goals' in result:
        lines += ['| goal | at most | here | reached |', '|---|---|---|---|']
        for goal in result['goals'].values():
            here, met = goal.get('failed'), 'failed'
            if not here:
                here = f'{goal["reached"]:.3g} {goal["unit"]}'
                met = 'yes' if goal['reached'] <= goal['most'] else 'no'
            lines.append(f'| {goal["title"]} | {goal["most"]:g} {goal["unit"]} | {here} | {met} |')
        return '\n'.join(lines) + '\n'
    lines += [result['dataset'], '', *timing.table(result['sections'])]
    return '\n'.join(lines) + '\n'


def failures(result: Mapping[str, Any]) -> list[str]:
    """The rows and goals that failed, with their errors."""
    sections = result.get('sections', {}).values()
    rows = [(record['name'], record) for section in sections for record in section]
    rows += result.get('goals', {}).items()
    return [f'{name}: {record["failed"]}' for name, record in rows if 'failed' in record]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--dataset', default='toys', help='as of fame_jax.main')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--out', type=Path, help='folder for speed.json and speed.md')
    parser.add_argument('--only', default='', help=f'some of {",".join(SECTIONS)}, or some goals')
    parser.add_argument('--quick', action='store_true', help='a smoke test on synthetic data')
    parser.add_argument('--goals', action='store_true', help='measure the goals, no sections')
    arguments = parser.parse_args(argv)
    arguments.only = [name for name in arguments.only.split(',') if name]
    known = GOALS if arguments.goals else SECTIONS
    if unknown := [name for name in arguments.only if name not in known]:
        parser.error(f'--only={",".join(unknown)}: choose from {", ".join(known)}')
    return arguments


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes; 1 where a row failed, 2 for a mistake of the user."""
    arguments = parse_arguments(argv)
    result: Record = {'machine': timing.describe_machine(), 'quick': arguments.quick}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if arguments.goals:
                result['goals'] = reach_goals(arguments, folder)
            else:
                bench = Bench(arguments.dataset, arguments.data_dir, folder, arguments.quick)
                result |= {'dataset': bench.base.data.describe(), 'sections': {}}
                for section in arguments.only or SECTIONS:
                    print(f'speed: {section}', file=sys.stderr, flush=True)
                    result['sections'][section] = SECTIONS[section](bench)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    result['peak_bytes'] = timing.peak_bytes()
    print(markdown(result))
    if arguments.out:
        name = 'goals' if arguments.goals else 'speed'
        arguments.out.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(arguments.out / f'{name}.json', result)
        run_dir.write_text(arguments.out / f'{name}.md', markdown(result))
    for line in failures(result):
        print(f'failed: {line}', file=sys.stderr)
    return 1 if failures(result) else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
