"""Catalogues of millions of items on one device: a training step, ranking and top-k, and memory.

    python -m benchmarks.large_catalogue --items=1000000 --tokens=4096 --out=FILE.json
    python -m benchmarks.large_catalogue --items=10000000 --abstract

A step is SASRec's of one block as a run takes it: encoder, loss, dense Adam over the table. The
forms of the loss are measured one after another, since only one state fits. Memory is reported by
XLA, in bytes and in tables of V + 1 rows of D floats: arguments are the parameters and Adam's two
moments, aliased the part of them that a step updates in place, temporaries all further memory.
--abstract compiles from shapes and runs nothing, so a catalogue of any size can be examined.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Record
from fame_jax import losses, run_dir
from fame_jax.batch import Batch
from fame_jax.evaluation import ranking
from fame_jax.models import registry
from fame_jax.models.item_model import ItemModel
from fame_jax.training import step as step_lib
from fame_jax.training.optimizer import make_optimizer

ROW = 64  # positions of a row
SERVED = 16  # users of one top-k
TOO_LARGE = 2**32  # bytes; a form of the loss that needs more in addition to the state is left out

# Fields of LossOptions for each form; of the loss chunks, only those that the form uses.
FORMS = {
    'plain': {'chunk_tokens': 0, 'chunk_items': 0},
    'chunks of tokens': {'chunk_items': 0},
    'chunks of items': {},
    'sampled, uniform': {'loss': 'sampled'},
    'sampled, popularity': {'loss': 'sampled', 'negatives': 'popularity'},
}


def expected_bytes(form: str, items: int, tokens: int, chunk_tokens: int, width: int) -> int:
    """Estimated bytes of logits and tables in addition to the state, before any compilation."""
    logits = {'plain': 2 * tokens, 'chunks of tokens': chunk_tokens}.get(form, 0)
    tables = {'plain': 2, 'chunks of tokens': 3}.get(form, 0)
    return 4 * items * (logits + tables * width)


def time_step(
    form: str,
    items: int,
    tokens: int,
    chunks: tuple[int, int],
    *,
    width: int = 64,
    negatives: int = 8192,
    steps: int = 3,
    abstract: bool = False,
) -> Record:
    """Memory of a training step, and its seconds unless abstract.

    Args:
      form: of the loss, one of FORMS.
      items: V.
      tokens: of a step, in rows of 64 positions.
      chunks: tokens and items of a chunk.
      width: D.
      negatives: of a step, for sampled softmax.
      steps: timed steps, after one that is not timed.
      abstract: compile from shapes and run nothing.
    """
    sizes = {'num_negatives': negatives, 'chunk_tokens': chunks[0], 'chunk_items': chunks[1]}
    options = losses.LossOptions(**sizes | FORMS[form])
    if options.negatives == 'popularity':
        # The n-th item occurs 1 / n times as often as the first.
        counts_V = (items / np.arange(1, items + 2)).astype(np.int64)
        popularity_V = jnp.asarray(losses.cumulative_counts(counts_V))
        options = dataclasses.replace(options, popularity_V=popularity_V)
    module = registry.make('sasrec', {'width': width, 'num_blocks': 1}, num_items=items)
    optimizer = make_optimizer(learning_rate=1e-3)

    def objective(options: losses.LossOptions, *arguments: Any) -> tuple:
        return module.objective(*arguments, options)

    make = (lambda f: functools.partial(jax.eval_shape, f)) if abstract else jax.jit
    # Parameters first: drawing them needs three more tables, before the moments are there.
    key = jax.random.key(0)
    params = make(functools.partial(registry.init_params, module))(key)
    state = step_lib.State(make(lambda: jnp.int32(0))(), params, make(optimizer.init)(params))
    program = step_lib.Program(
        step_lib.make_step(jax.tree_util.Partial(objective, options), optimizer)
    )
    batch = make_batch(tokens // ROW, items)
    began = time.perf_counter()
    compiled = program.precompile(state, batch, key).result()
    record = {'name': form, 'compile_seconds': time.perf_counter() - began}
    record |= memory(compiled, 4 * (items + 1) * width)
    if abstract:
        return record
    times = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        state, sums = program(state, [batch], key)
        record['loss'] = float(sums['loss'][0] / sums['weight'][0])
        times.append(time.perf_counter() - began)
    return record | timing.spread(times[1:]) | {'peak_bytes': timing.peak_bytes()}


def make_batch(rows: int, items: int) -> Batch:
    """Full rows of one history each, of random items."""
    draw = np.random.default_rng(0)
    tokens_BL, targets_BL = draw.integers(1, items + 1, (2, rows, ROW), np.int32)
    one_BL = np.ones((rows, ROW), np.int32)
    positions_BL = np.tile(np.arange(ROW, dtype=np.int32) % 50, (rows, 1))
    return Batch(tokens_BL, positions_BL, one_BL, targets_BL, one_BL.astype(np.float32))


def memory(compiled: Any, table: int) -> Record:
    """Memory of a compiled program in bytes, and in tables of so many bytes."""
    analysis = compiled.memory_analysis()
    sizes = {
        'arguments': analysis.argument_size_in_bytes,
        'aliased': analysis.alias_size_in_bytes,
        'temporaries': analysis.temp_size_in_bytes,
    }
    own = sizes['temporaries'] + analysis.output_size_in_bytes - sizes['aliased']
    sizes['total'] = sizes['arguments'] + own
    in_tables = {f'{name}_tables': size / table for name, size in sizes.items()}
    return (
        {f'{name}_bytes': size for name, size in sizes.items()} | in_tables | {'table_bytes': table}
    )


def measure_training(args: argparse.Namespace, items: int) -> Iterator[Record]:
    """A step by each form of the loss; its state is freed before the next one is made."""
    chunk_tokens, chunk_items = map(int, args.loss_chunk.split(','))
    for form in args.forms:
        expected = expected_bytes(form, items, args.tokens, chunk_tokens, args.width)
        if expected > TOO_LARGE and not args.abstract:
            yield {'name': form, 'left_out': f'it would need {expected / 2**30:.1f} GiB'}
        else:
            options = {n: getattr(args, n) for n in ('width', 'negatives', 'steps', 'abstract')}
            yield time_step(form, items, args.tokens, (chunk_tokens, chunk_items), **options)


def measure_ranking(args: argparse.Namespace, items: int) -> Iterator[Record]:
    """Ranks in blocks of two sizes, and a top-k over all items, as serving computes it."""
    users, width = args.users, args.width
    shapes = {
        'query_BQD': (users, 1, width),
        'item_VD': (items + 1, width),
        'target_B': (users,),
        'seen_BS': (users, 64),
    }

    def make(name: str, shape: tuple[int, ...]) -> Any:
        array = functools.partial(random_array, name, shape, items)
        return jax.eval_shape(array) if args.abstract else array()

    data = {name: make(name, shape) for name, shape in shapes.items()}
    block = ranking.block_size(users, 1, items) or items
    cases: dict[str, tuple[Callable[..., Any], tuple]] = {
        f'rank {users} users, {size:,} items a block': (
            functools.partial(ranking.rank_in_blocks, combine=ItemModel.combine, block=size),
            tuple(data.values()),
        )
        for size in sorted({min(size, items) for size in (block, 4 * block)})
    }
    served = min(SERVED, users)
    cases[f'top 20 of {served} users'] = (
        top_k,
        (make('query_BQD', (served, 1, width)), data['item_VD']),
    )
    for name, (function, arrays) in cases.items():
        compiled = jax.jit(function).lower(*arrays).compile()
        record = {'name': name} | memory(compiled, 4 * (items + 1) * width)
        if not args.abstract:
            call = functools.partial(compiled, *arrays)
            times = [timing.time_calls(call, 1) for _ in range(1 + args.steps)]
            record |= timing.spread(times[1:]) | {'peak_bytes': timing.peak_bytes()}
        yield record


def random_array(name: str, shape: tuple[int, ...], items: int) -> jax.Array:
    """Vectors in random directions where the name ends in D, or else random items."""
    key = jax.random.key(len(name))
    if name.endswith('D'):
        return jax.jit(jax.random.normal, static_argnums=1)(key, shape)
    return jax.random.randint(key, shape, 1, items + 1)


def top_k(query_BQD: jax.Array, item_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The twenty items of highest score for each user."""
    score_BV = ranking.scores(query_BQD, item_VD, ItemModel.combine)
    return jax.lax.top_k(score_BV.at[:, 0].set(-jnp.inf), 20)


def line(record: Record) -> str:
    """A record in one line."""
    if 'left_out' in record:
        return f'{record["name"]:40} left out: {record["left_out"]}'
    seconds = f'{record["seconds"]["median"]:9.3f} s' if 'seconds' in record else f'{"":11}'
    return (
        f'{record["name"]:40} {seconds}  arguments {record["arguments_tables"]:5.2f} tables, '
        f'aliased {record["aliased_tables"]:5.2f}, temporaries {record["temporaries_tables"]:5.2f} '
        f'({record["temporaries_bytes"] / 1e6:,.0f} MB), total {record["total_bytes"] / 1e9:.2f} GB'
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--items', default='1000000', help='sizes V of catalogues, with commas')
    parser.add_argument('--tokens', type=int, default=4096, help='of a step, in rows of 64')
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--loss_chunk', default='512,2048', help='TOKENS,ITEMS of a chunk')
    parser.add_argument('--negatives', type=int, default=8192, help='of a step')
    parser.add_argument('--users', type=int, default=1024, help='ranked at a time')
    parser.add_argument('--steps', type=int, default=3, help='timed, after one that is not')
    parser.add_argument(
        '--forms', nargs='*', choices=FORMS, default=list(FORMS), help='of the loss'
    )
    parser.add_argument('--only', default='training,ranking')
    parser.add_argument('--abstract', action='store_true', help='compile from shapes, run nothing')
    parser.add_argument('--out', type=Path, help='write the figures to this .json')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(argv)
    parts = {'training': measure_training, 'ranking': measure_ranking}
    settings = {name: value for name, value in vars(args).items() if name != 'out'}
    result = {'machine': timing.describe_machine(), 'settings': settings, 'catalogues': []}
    for items in map(int, args.items.split(',')):
        catalogue: Record = {'items': items}
        result['catalogues'].append(catalogue)
        print(f'{items:,} items, {args.tokens} tokens, width {args.width}')
        for part in args.only.split(','):
            catalogue[part] = []
            for record in parts[part](args, items):
                catalogue[part].append(record)
                print(line(record), flush=True)
                if args.out:
                    run_dir.write_json(args.out, result)


if __name__ == '__main__':
    main(sys.argv[1:])
