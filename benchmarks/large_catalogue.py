"""Catalogues of millions of items on one device: a training step, ranking and top-k, and memory.

    python -m benchmarks.large_catalogue --items=1000000 --tokens=4096 --width=64 --json=large.json
    python -m benchmarks.large_catalogue --items=10000000,20000000 --abstract

A step is SASRec's of one block, as a run takes it: encoder, loss, dense Adam over the table. The
ways to the loss are measured one after another, for only one state fits. What XLA says of memory is
told in tables, one being V + 1 rows of width floats: arguments are the parameters and Adam's two
moments, `aliased` is how much of them the step gives back in the same place, temporaries are what
it takes beside them. --abstract compiles for shapes alone and runs nothing, so any catalogue fits.
Targets and tables are random; a step's time does not depend on them.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from fame_jax import evaluate, losses, programs
from fame_jax.batch import Batch
from fame_jax.config import Config
from fame_jax.models.build import build, build_objective, initial
from fame_jax.models.items import ItemModel

Record = dict[str, Any]

ROW = 64  # positions of a row
SERVED = 16  # users who are recommended something at a time
# Beside the state, a variant that would take more is left out.
TOO_MUCH = 2**32

VARIANTS = {
    'plain': {'chunk_tokens': 0, 'chunk_items': 0},
    'chunks of tokens': {'chunk_items': 0},
    'streamed': {},
    'sampled, uniform': {'loss': 'sampled'},
    'sampled, popularity': {'loss': 'sampled', 'negatives': 'popularity'},
}


def settings(args: argparse.Namespace) -> Config:
    """What all variants have in common."""
    return Config(
        model='sasrec',
        width=args.width,
        num_blocks=1,
        num_negatives=args.negatives,
        chunk_tokens=args.chunk_tokens,
        chunk_items=args.chunk_items,
        rows_per_step=args.tokens // ROW,
    )


def expected_bytes(name: str, config: Config, items: int) -> int:
    """About what a variant takes beside the state, logits and tables, before it is compiled."""
    tokens = config.rows_per_step * ROW
    table = 4 * items * config.width
    if name == 'plain':
        return 2 * 4 * tokens * items + 2 * table
    return 4 * config.chunk_tokens * items + 3 * table if name == 'chunks of tokens' else 0


class Step:
    """A training step in one variant, compiled."""

    def __init__(self, name: str, config: Config, items: int, abstract: bool):
        """abstract: shapes alone, and nothing can be run."""
        self.times = []
        module = build('sasrec', config, items)
        optimizer = programs.make_optimizer(config.learning_rate, config.adam_b2, 0.0)
        objective = functools.partial(build_objective('sasrec', config), module)
        if config.negatives == 'popularity':
            popularity_V = jnp.asarray(losses.cumulate(counts(items)))
            objective = jax.tree_util.Partial(objective, popularity_V=popularity_V)

        # Parameters first: drawing them takes three tables more, and the moments are not there yet.
        made = (lambda f: functools.partial(jax.eval_shape, f)) if abstract else jax.jit
        self.key = jax.random.key(0)
        params = made(functools.partial(initial, module))(self.key)
        step = made(lambda: jnp.int32(0))()
        self.state = programs.State(step, params, made(optimizer.init)(params))
        self.program = programs.Program(programs.make_step(objective, optimizer))
        self.batch = make_batch(config.rows_per_step, items)
        began = time.perf_counter()
        compiled = self.program.compile(self.state, self.batch, self.key)
        self.about = {'name': name, 'compile_seconds': time.perf_counter() - began}
        self.about |= memory(compiled, 4 * (items + 1) * config.width)

    def take_turn(self) -> None:
        """One step, timed."""

        def step() -> jax.Array:
            self.state, sums = self.program(self.state, [self.batch], self.key)
            return sums

        sums, times = timed(step)
        self.about['loss'] = float(sums[0, 0] / sums[0, 1])
        self.times.append(times)

    def record(self) -> Record:
        """What was found; the first step is not counted."""
        return self.about | spread(self.times[1:])


def counts(items: int) -> np.ndarray:
    """Actions of each item as catalogues have them, the n-th item's as 1 / n."""
    return (items / np.arange(1, items + 2)).astype(np.int64)


def make_batch(rows: int, items: int) -> Batch:
    """Full rows of one history each."""
    draw = np.random.default_rng(0)
    tokens_BL, targets_BL = draw.integers(1, items + 1, (2, rows, ROW), np.int32)
    one_BL = np.ones((rows, ROW), np.int32)
    positions_BL = np.tile(np.arange(ROW, dtype=np.int32) % 50, (rows, 1))
    return Batch(tokens_BL, positions_BL, one_BL, targets_BL, one_BL.astype(np.float32))


def memory(compiled: Any, table: int) -> Record:
    """What XLA says of a program, in bytes, and in tables beside it."""
    found = compiled.memory_analysis()
    sizes = {
        'arguments': found.argument_size_in_bytes,
        'aliased': found.alias_size_in_bytes,
        'temporaries': found.temp_size_in_bytes,
    }
    held = sizes['arguments'] + sizes['temporaries'] + found.output_size_in_bytes - sizes['aliased']
    sizes['held'] = held
    return {f'{name}_bytes': size for name, size in sizes.items()} | {
        f'{name}_tables': size / table for name, size in sizes.items()
    }


def timed(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What a call gives, and its seconds: on the clock, and of the processor in all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call())
    return result, (time.perf_counter() - clock, time.process_time() - processor)


def spread(times: list[tuple[float, float]]) -> Record:
    """Median and extremes; nothing where nothing was timed."""
    if not times:
        return {}
    found = {'calls': len(times)}
    for name, column in zip(('seconds', 'processor_seconds'), zip(*times)):
        least, median, most = np.quantile(column, [0, 0.5, 1]).tolist()
        found[name] = {'median': median, 'least': least, 'most': most}
    return found


def training(args: argparse.Namespace, items: int) -> Iterator[Record]:
    """Each variant's step."""
    for name in args.variants:
        config = dataclasses.replace(settings(args), **VARIANTS[name])
        expected = expected_bytes(name, config, items)
        if expected > TOO_MUCH and not args.abstract:
            yield {'name': name, 'left_out': f'it would take {expected / 2**30:.1f} GiB'}
        else:
            yield measured(name, config, items, args)


def measured(name: str, config: Config, items: int, args: argparse.Namespace) -> Record:
    """A variant's record. Its state is gone before the next one's is made."""
    step = Step(name, config, items, args.abstract)
    if args.abstract:
        return step.record()
    for _ in range(1 + args.steps):
        step.take_turn()
    return step.record() | {'peak_bytes': machine.peaks()}


def judging(args: argparse.Namespace, items: int) -> Iterator[Record]:
    """Ranking in blocks of several sizes, and a top-k over all items as recommending has it."""
    width, users, seen = args.width, args.users, 64
    shapes = {
        'query_BQD': jax.ShapeDtypeStruct((users, 1, width), jnp.float32),
        'item_VD': jax.ShapeDtypeStruct((items + 1, width), jnp.float32),
        'target_B': jax.ShapeDtypeStruct((users,), jnp.int32),
        'seen_BS': jax.ShapeDtypeStruct((users, seen), jnp.int32),
    }
    block = evaluate.block_size(users, 1, items) or items
    programs = {
        f'rank {users} users, {size:,} items a block': (
            functools.partial(evaluate.rank_in_blocks, combine=ItemModel.combine, block=size),
            tuple(shapes),
        )
        for size in sorted({min(size, items) for size in (block, 4 * block)})
    }
    programs[f'top 20 of {min(SERVED, users)} users'] = (top, ('query_BQD', 'item_VD'))
    data = None if args.abstract else make_data(users, seen, items, width)
    for name, (function, names) in programs.items():
        compiled = jax.jit(function).lower(*(_cut(name, shapes, n) for n in names)).compile()
        record = {'name': name} | memory(compiled, 4 * (items + 1) * width)
        if data:
            arrays = [_cut(name, data, n) for n in names]
            call = functools.partial(compiled, *arrays)
            times = [timed(call)[1] for _ in range(1 + args.steps)]
            record |= spread(times[1:]) | {'peak_bytes': machine.peaks()}
        yield record


def _cut(name: str, arrays: dict[str, Any], field: str) -> Any:
    """An argument of a program; not all users are served at a time."""
    array = arrays[field]
    if not name.startswith('top') or field == 'item_VD':
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((min(SERVED, array.shape[0]), *array.shape[1:]), array.dtype)
    return array[:SERVED]


def top(query_BQD: jax.Array, item_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The twenty best items of each user, as serving asks for them."""
    score_BV = evaluate.scores(query_BQD, item_VD, ItemModel.combine)
    return jax.lax.top_k(score_BV.at[:, 0].set(-jnp.inf), 20)


def make_data(users: int, seen: int, items: int, width: int) -> dict[str, jax.Array]:
    """Queries and items in random directions."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = functools.partial(jax.random.randint, minval=1, maxval=items + 1)
    return {
        'query_BQD': jax.random.normal(keys[0], (users, 1, width)),
        'item_VD': jax.jit(jax.random.normal, static_argnums=1)(keys[1], (items + 1, width)),
        'target_B': draw(keys[2], (users,)),
        'seen_BS': draw(keys[3], (users, seen)),
    }


def told(record: Record) -> str:
    """A record in one line."""
    if 'left_out' in record:
        return f'{record["name"]:40} left out: {record["left_out"]}'
    time_ = f'{record["seconds"]["median"]:9.3f} s' if 'seconds' in record else f'{"":11}'
    return (
        f'{record["name"]:40} {time_}  arguments {record["arguments_tables"]:5.2f} tables, aliased '
        f'{record["aliased_tables"]:5.2f}, temporaries {record["temporaries_tables"]:5.2f} '
        f'({record["temporaries_bytes"] / 1e6:,.0f} MB), held {record["held_bytes"] / 1e9:.2f} GB'
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; None: those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--items', default='1000000', help='V, comma-separated.')
    parser.add_argument('--tokens', type=int, default=4096, help='Of a step, in rows of 64.')
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--chunk_tokens', type=int, default=512)
    parser.add_argument('--chunk_items', type=int, default=2048)
    parser.add_argument('--negatives', type=int, default=8192, help='Of a step.')
    parser.add_argument('--users', type=int, default=1024, help='Ranked at a time.')
    parser.add_argument('--steps', type=int, default=3, help='Timed, after one that is not.')
    parser.add_argument('--variants', default=','.join(VARIANTS).replace(', ', '+'))
    parser.add_argument('--only', default='training,judging')
    parser.add_argument('--abstract', action='store_true', help='Compile for shapes; run nothing.')
    parser.add_argument('--json', help='Write the result to this file too.')
    args = parser.parse_args(argv)
    args.variants = [name.replace('+', ', ') for name in args.variants.split(',')]
    return args


def main() -> None:
    """Measures, tells and writes."""
    args = parse_arguments()
    parts = {'training': training, 'judging': judging}
    result = {'machine': machine.about(), 'settings': vars(args), 'catalogues': []}
    for items in map(int, args.items.split(',')):
        found = {'items': items}
        print(f'{items:,} items, {args.tokens} tokens, width {args.width}')
        for part in args.only.split(','):
            found[part] = []
            for record in parts[part](args, items):
                found[part].append(record)
                print(told(record), flush=True)
        result['catalogues'].append(found)
        if args.json:
            with open(args.json, 'w') as file:
                json.dump(result, file, indent=2)


if __name__ == '__main__':
    main()
