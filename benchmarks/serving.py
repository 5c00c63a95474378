"""Serving: latency of one history, throughput of 1,024, and the first answer of an export.

    python -m benchmarks.serving --out=FILE.json
    python -m benchmarks.serving --export=FOLDER        the first answer of an export of yours

FAME and SASRec of the Toys recipe with random parameters, over random catalogues; histories are as
long as those of Toys. The rows take turns of a few calls, after every shape has been compiled:

    FAME, SASRec          Recommender.recommend for one history, recommend_many for many
    query given           scores and top-k of given query vectors, on the device
    FAISS                 IndexFlatIP with the same queries and items, where faiss is installed
    ONNX Runtime          FAME's model.onnx, and top-k by numpy, where onnx is installed

The first answer is that of a fresh process, counted from the start of the interpreter. Unseen
shapes are calls of FAME that no call before had the shape of, in milliseconds of the processor:
without a warm-up the first call compiles, and after one none does.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from fame_jax import run_dir
from fame_jax.models import registry
from fame_jax.serving import export, onnx_model
from fame_jax.serving.recommender import Recommender
from fame_jax.stages.open_recommender import serving_model

RECIPE = {'width': 64, 'num_blocks': 2, 'num_heads': 2, 'num_experts': 8, 'max_length': 50}
MODELS = {'FAME': 'fame', 'SASRec': 'sasrec'}
TOP_K = 20
TURN = 10  # calls of a row before the next row has its turn
# Toys: this share of its 19,412 users has at most so many actions (mean 8.6).
SHARES = (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.999, 1)
LENGTHS = (5, 5, 6, 7, 8, 10, 11, 14, 20, 28, 40, 89, 550)

FIRST_ANSWER = """
import time
began = time.perf_counter()
import json, sys
from fame_jax.serving import export
imported = time.perf_counter()
recommender = export.load(sys.argv[1])
loaded = time.perf_counter()
recommender.recommend(recommender.item_ids[1:7], 20)
answered, at = time.perf_counter(), time.time()
print(json.dumps({
    'import': imported - began, 'load': loaded - imported, 'answer': answered - loaded, 'at': at,
}))
"""

Calls = Mapping[str, Callable[[int], Any]]


def make_histories(count: int, num_items: int) -> list[list[str]]:
    """Histories of random items, as outside ids, as long as those of Toys."""
    rng = np.random.default_rng(0)
    lengths = np.interp(rng.random(count), SHARES, LENGTHS).astype(int)
    return [[str(item) for item in rng.integers(1, num_items + 1, n)] for n in lengths.tolist()]


def make_recommender(model: str, num_items: int) -> Recommender:
    """A Recommender with random parameters and random items."""
    known = registry.options(registry.find(model))
    options = {name: value for name, value in RECIPE.items() if name in known}
    module = registry.make(model, options, num_items=num_items)
    params = registry.init_params(module, jax.random.key(0))
    ids = ['', *map(str, range(1, num_items + 1))]
    served = serving_model(module, params, module.max_length)
    return Recommender(served, ids, np.ones(num_items + 1, int), card={'model': model})


@partial(jax.jit, static_argnums=2)
def search(query_BD: jax.Array, item_VD: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The items of highest score for each query, and their scores."""
    score_BV = jnp.einsum('BD,VD->BV', query_BD, item_VD, preferred_element_type=jnp.float32)
    score_BK, item_BK = jax.lax.top_k(score_BV.at[:, 0].set(-jnp.inf), top_k)
    return item_BK, score_BK


class Catalogue:
    """Two recommenders over one catalogue, with histories and queries."""

    def __init__(self, num_items: int, count: int):
        self.recommenders = {t: make_recommender(m, num_items) for t, m in MODELS.items()}
        self.histories = make_histories(count, num_items)
        self.query_BD = np.random.default_rng(1).normal(size=(count, RECIPE['width']))
        self.query_BD = self.query_BD.astype(np.float32)
        fame = self.recommenders['FAME']
        self.item_VD, self.chunk = fame.model.item_VD, min(fame.batch_size, count)
        self.index = None
        if importlib.util.find_spec('faiss'):
            import faiss

            self.index = faiss.IndexFlatIP(RECIPE['width'])
            self.index.add(np.array(self.item_VD[1:], np.float32))
        self.session = None
        if importlib.util.find_spec('onnx') and importlib.util.find_spec('onnxruntime'):
            import onnxruntime

            with tempfile.TemporaryDirectory() as folder:
                assert not onnx_model.write(fame, Path(folder))
                file = str(Path(folder) / onnx_model.FILE)
                self.session = onnxruntime.InferenceSession(file)

    def search(self, query_BD: np.ndarray) -> list[Any]:
        """The top-k of queries, as many at a time as the recommender takes."""
        starts = range(0, len(query_BD), self.chunk)
        parts = [search(query_BD[s : s + self.chunk], self.item_VD, TOP_K) for s in starts]
        return jax.block_until_ready(parts)

    def one(self) -> Calls:
        """Name -> the answer to history i."""
        calls = {
            title: lambda i, of=of: of.recommend(self.histories[i], TOP_K)
            for title, of in self.recommenders.items()
        }
        calls['query given'] = lambda i: self.search(self.query_BD[i : i + 1])
        if self.index:
            calls['FAISS'] = lambda i: self.index.search(self.query_BD[i : i + 1], TOP_K)
        if self.session:
            calls['ONNX Runtime'] = lambda i: self.score_by_onnx(self.histories[i : i + 1])
        return calls

    def score_by_onnx(self, histories: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The best items of histories by model.onnx, as indices; as many at a time as FAME."""
        length, best = RECIPE['max_length'], []
        for begin in range(0, len(histories), self.chunk):
            part = histories[begin : begin + self.chunk]
            items_BL = np.zeros((len(part), length), np.int32)
            for row_L, history in zip(items_BL, part):
                row_L[: len(history[-length:])] = list(map(int, history[-length:]))
            (score_BV,) = self.session.run(None, {onnx_model.INPUT: items_BL})
            found_BK = np.argpartition(-score_BV, TOP_K, axis=1)[:, :TOP_K]
            order_BK = np.argsort(-np.take_along_axis(score_BV, found_BK, axis=1), axis=1)
            best.append(np.take_along_axis(found_BK, order_BK, axis=1))
        return best

    def many(self) -> Calls:
        """Name -> the answers to all histories."""
        calls = {
            title: lambda _, of=of: list(of.recommend_many(self.histories, TOP_K))
            for title, of in self.recommenders.items()
        }
        calls['query given'] = lambda _: self.search(self.query_BD)
        if self.index:
            calls['FAISS'] = lambda _: self.index.search(self.query_BD, TOP_K)
        if self.session:
            calls['ONNX Runtime'] = lambda _: self.score_by_onnx(self.histories)
        return calls


def take_turns(calls: Calls, arguments: Sequence[int], warm: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of each row's calls: p10, p50, p90 and p99; calls of `warm` are not timed."""
    for call in calls.values():
        for argument in warm:
            call(argument)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for begin in range(0, len(arguments), TURN):
        for name, call in calls.items():
            for argument in arguments[begin : begin + TURN]:
                began = time.perf_counter()
                call(argument)
                times[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: {f'p{p}': float(np.percentile(of, p)) for p in (10, 50, 90, 99)} | {'n': len(of)}
        for name, of in times.items()
    }


def measure(num_items: int, args: argparse.Namespace) -> tuple[dict[str, Any], Recommender]:
    """The figures of one catalogue, and FAME's recommender."""
    catalogue = Catalogue(num_items, args.histories)
    everyone = range(args.histories)
    one = take_turns(catalogue.one(), [i % args.histories for i in range(args.calls)], everyone)
    many = take_turns(catalogue.many(), range(args.batches), [0])
    for of in many.values():
        of['histories_per_second'] = 1e3 * args.histories / of['p50']
    for rows in (one, many):
        for of in rows.values():
            of['ratio'] = of['p50'] / rows['SASRec']['p50']  # the named alternative
    figures = {'items': num_items, 'histories': args.histories, 'chunk': catalogue.chunk}
    return figures | {'one_ms': one, 'many_ms': many}, catalogue.recommenders['FAME']


def unseen_shapes(num_items: int) -> dict[str, dict[str, float]]:
    """Processor milliseconds of first calls of new shapes, without and after a warm-up."""
    history = [str(item) for item in range(1, 8)]
    calls: dict[str, Callable[[Recommender], Any]] = {
        'the first call, k = 20': lambda of: of.recommend(history, 20),
        'k = 33': lambda of: of.recommend(history, 33),
        'a history of 40': lambda of: of.recommend(history * 6, 20),
        'a history of 3,500': lambda of: of.recommend(history * 500, 20),
        'filter_seen=False': lambda of: of.recommend(history, 20, filter_seen=False),
        'similar_items, k = 13': lambda of: of.similar_items('5', 13),
        '5 histories': lambda of: list(of.recommend_many([history] * 5, 20)),
        '64 histories': lambda of: list(of.recommend_many([history] * 64, 20)),
        'the first call again': lambda of: of.recommend(history, 20),
    }
    times: dict[str, dict[str, float]] = {}
    for column in ('without', 'after warm_up'):
        recommender = make_recommender('fame', num_items)
        if column == 'after warm_up':
            calls = {'warm_up(k=200)': lambda of: of.warm_up(200), **calls}
        for name, call in calls.items():
            began = time.process_time()
            call(recommender)
            times.setdefault(name, {})[column] = 1e3 * (time.process_time() - began)
    return times


def first_answer(folder: Path, starts: int) -> dict[str, float]:
    """Seconds from the start of a process to its first answer, and its parts; medians."""
    starts_timed = []
    for _ in range(starts):
        began = time.time()
        ended = subprocess.run(
            [sys.executable, '-c', FIRST_ANSWER, str(folder.resolve())],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        parts = json.loads(ended.stdout)
        starts_timed.append(parts | {'seconds': parts.pop('at') - began})
    return {name: float(np.median([one[name] for one in starts_timed])) for name in starts_timed[0]}


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as tables."""
    lines = [timing.headline(result['machine'])]
    for catalogue in result['catalogues']:
        lines += [
            f'\n{catalogue["items"]:,} items; many: {catalogue["histories"]:,} histories, '
            f'{catalogue["chunk"]} on the device at a time; ratios to SASRec\n',
            '| | one: p50 ms | p90 | p99 | ratio | many: ms (P10 - P90) | a second | ratio |',
            '|---|---|---|---|---|---|---|---|',
        ]
        for name, a in catalogue['one_ms'].items():
            b = catalogue['many_ms'][name]
            lines.append(
                f'| {name} | {a["p50"]:.3f} | {a["p90"]:.3f} | {a["p99"]:.3f} | {a["ratio"]:.2f} | '
                f'{b["p50"]:.1f} ({b["p10"]:.1f} - {b["p90"]:.1f}) | '
                f'{b["histories_per_second"]:,.0f} | {b["ratio"]:.2f} |'
            )
    lines += [
        '\n| first answer of a process | s | import | load | answer |',
        '|---|---|---|---|---|',
    ]
    for name, of in result['first_answer'].items():
        parts = ' | '.join(f'{of[part]:.2f}' for part in ('seconds', 'import', 'load', 'answer'))
        lines.append(f'| {name} | {parts} |')
    for num_items, times in result['unseen_shapes'].items():
        lines += [
            f'\n| {num_items} items, processor ms | without | after warm_up |',
            '|---|---|---|',
        ]
        for name, of in times.items():
            without = f'{of["without"]:,.1f}' if 'without' in of else ''
            lines.append(f'| {name} | {without} | {of["after warm_up"]:,.1f} |')
    return '\n'.join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--export', type=Path, help='folder; time only its first answer')
    parser.add_argument('--out', type=Path, help='write the figures to this .json')
    parser.add_argument('--items', default='12000,1000000', help='sizes of the catalogues')
    parser.add_argument('--histories', type=int, default=1024)
    parser.add_argument('--calls', type=int, default=500, help='with one history, of each row')
    parser.add_argument('--batches', type=int, default=10, help='with all histories, of each row')
    parser.add_argument('--starts', type=int, default=5, help='fresh processes')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(argv)
    result: dict[str, Any] = {
        'machine': timing.describe_machine(),
        'recipe': RECIPE,
        'top_k': TOP_K,
    }
    result |= {'catalogues': [], 'first_answer': {}, 'unseen_shapes': {}}
    if args.export:
        result['first_answer'][args.export.name] = first_answer(args.export, args.starts)
    for num_items in [] if args.export else map(int, args.items.split(',')):
        figures, recommender = measure(num_items, args)
        result['catalogues'].append(figures)
        result['unseen_shapes'][f'{num_items:,}'] = unseen_shapes(num_items)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'export'
            export.save(recommender, path)
            result['first_answer'][f'FAME, {num_items:,} items'] = first_answer(path, args.starts)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(args.out, result)


if __name__ == '__main__':
    main(sys.argv[1:])
