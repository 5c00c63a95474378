"""What heads and experts cost: time and memory of a step, and how a trained run uses its experts.

    python -m benchmarks.experts --json=FILE
    python -m benchmarks.experts --quick                   minutes: fewer sizes
    python -m benchmarks.experts --use=runs/a,runs/b       experts of finished runs, no timing

A step is FAME's loss and its gradient on rows full of short histories. The ways of one size take
turns. Milliseconds are from call to call (P10 - P90); CPU is the median of what the process used,
which other programs of the machine disturb less. Temporaries are XLA's own count.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.turns import Effort, Program, contest
from fame_jax import config as config_lib
from fame_jax import records, serving
from fame_jax import run as run_lib
from fame_jax.batch import Batch
from fame_jax.models import experts
from fame_jax.models.build import build, build_objective, initial

ITEMS, HISTORY = 12_000, 6  # of the catalogue, and of each history in a row

# Ways to the same size; the first is what the others are compared with.
WAYS: dict[str, dict[str, Any]] = {
    'dense': {},
    'remat': {'remat': 'experts'},
    'inputs': {'routing': 'inputs'},
    'inputs, 2 active': {'routing': 'inputs', 'active_experts': 2},
    'inputs, 2 active, remat': {'routing': 'inputs', 'active_experts': 2, 'remat': 'experts'},
    'weights kept': {'attention_dropout': 0.0},
    'weights kept, fused': {'attention_dropout': 0.0, 'attention': 'fused'},
}


class Size(NamedTuple):
    """Heads, experts in each, rows and their length."""

    heads: int
    experts: int
    rows: int
    length: int

    def __str__(self) -> str:
        return f'H {self.heads} N {self.experts} L {self.length}'


class Step(Program):
    """A program that also tells the processor time of its calls."""

    def take_turn(self, seconds: float) -> None:
        began = time.process_time()
        calls = len(self.times)
        super().take_turn(seconds)
        self.busy = getattr(self, 'busy', [])
        self.busy.append((time.process_time() - began) / (len(self.times) - calls))

    def record(self) -> dict[str, Any]:
        return super().record() | {'cpu_seconds': float(np.median(self.busy))}


def make_batch(size: Size, num_items: int) -> Batch:
    """Rows full of histories of random items, the target of each position a random item."""
    shape, rng = (size.rows, size.length), np.random.default_rng(0)
    column = np.broadcast_to(np.arange(size.length, dtype=np.int32), shape)
    items = rng.integers(1, num_items + 1, (2, *shape), np.int32)
    return Batch(
        items[0], column % HISTORY, 1 + column // HISTORY, items[1], np.ones(shape, np.float32)
    )


def make_step(size: Size, num_items: int | None = None, **changes: Any) -> Step:
    """FAME's loss and gradient, of random parameters."""
    config = config_lib.Config(
        num_heads=size.heads,
        num_experts=size.experts,
        max_length=min(50, size.length),
        row_length=size.length,
        rows_per_step=size.rows,
        **changes,
    )
    config_lib.check(config)
    num_items = num_items or ITEMS
    module = build('fame', config, num_items)
    objective = functools.partial(build_objective('fame', config), module)

    def mean_loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        total, count = objective(params, batch, key)
        return total / count

    key = jax.random.key(0)
    batch = jax.tree.map(jnp.asarray, make_batch(size, num_items))
    data = initial(module, key), batch, key
    return Step(jax.value_and_grad(mean_loss), data, items=size.rows * size.length)


def ways(size: Size) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those that mean something at a size."""
    for name, changes in WAYS.items():
        if changes.get('active_experts', 0) < size.experts:
            yield name, changes


def sizes(quick: bool) -> Iterator[Size]:
    """Experts and heads swept about the recipe's, and long rows."""
    for num_experts in (8, 32) if quick else (1, 2, 4, 8, 16, 32):
        yield Size(2, num_experts, 8, 64)
    for num_heads in (16,) if quick else (1, 4, 8, 16):
        yield Size(num_heads, 8, 8, 64)
    if not quick:
        yield from (Size(16, 32, 8, 64), Size(2, 8, 3, 200), Size(2, 32, 3, 200))


def measure(several: Sequence[Size], effort: Effort) -> list[dict[str, Any]]:
    """A record of each way at each size; compared within its size."""
    found = []
    for size in several:
        makers: dict[str, Callable[[], Step]] = {
            name: functools.partial(make_step, size, **changes) for name, changes in ways(size)
        }
        of_size = contest(makers, effort)
        found += [{'size': str(size), **size._asdict(), **record} for record in of_size]
        print(table(of_size, str(size)), flush=True)
    return found


def table(found: Sequence[dict[str, Any]], title: str) -> str:
    """One size's records as Markdown, each against the first."""
    lines = [
        f'| {title} | ms (P10 - P90) | against first | CPU ms | against first | temporaries MB |',
        '|---|---|---|---|---|---|',
    ]
    first = next((record for record in found if 'seconds' in record), None)
    for record in found:
        if 'seconds' not in record:
            lines.append(f'| {record["name"]} | {record["failed"]} | | | | |')
            continue
        p10, p50, p90 = (1e3 * record['seconds'][name] for name in ('p10', 'median', 'p90'))
        busy = record['cpu_seconds']
        lines.append(
            f'| {record["name"]} | {p50:.1f} ({p10:.1f} - {p90:.1f}) | '
            f'{record["seconds"]["p10"] / first["seconds"]["p10"]:.2f} | {1e3 * busy:.1f} | '
            f'{busy / first["cpu_seconds"]:.2f} | {record["temporaries_bytes"] / 1e6:.1f} |'
        )
    return '\n'.join(lines)


def use(workdir: str) -> dict[str, Any]:
    """How a run's FAME uses its experts, at every position of its validation histories."""
    config = config_lib.read(Path(workdir) / 'flags.cfg')
    run = run_lib.open_run(dataclasses.replace(config, workdir=workdir, progress='none'))
    model = serving.open_recommender(run).model
    look = jax.jit(model.look)
    router = []
    for held in run.held['validation']:
        out = look(model.params, *held[:3])
        router.append(np.asarray(out['positions_BLHN'])[(held.segments_BL > 0)])
    router_THN = np.concatenate(router)
    real_1T = np.ones((1, len(router_THN)), bool)
    return experts.use(router_THN[None], real_1T)


def tell_use(workdir: str) -> str:
    """That in a line a head."""
    found = use(workdir)
    lines = [f'{workdir}: {found["dead"]} dead experts']
    for h, share_N in enumerate(found['share']):
        entropy = '' if found['entropy'] is None else f', entropy {found["entropy"][h]:.3f}'
        told = ' '.join(f'{share:.3f}' for share in share_N)
        lines.append(f'  head {h + 1}: shares {told}{entropy}')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer sizes, shorter turns')
    parser.add_argument('--use', default='', help='folders of finished runs, with commas between')
    parser.add_argument('--json', type=Path, help='where to write the figures')
    arguments = parser.parse_args(argv)
    if arguments.use:
        print('\n'.join(map(tell_use, arguments.use.split(','))))
        return
    effort = Effort(rounds=4, seconds=0.15) if arguments.quick else Effort(rounds=8, seconds=0.25)
    found = {'machine': machine.about(), 'records': measure([*sizes(arguments.quick)], effort)}
    if arguments.json:
        records.write_json(arguments.json, found)


if __name__ == '__main__':
    main()
