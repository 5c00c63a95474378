"""Serving, measured: one history, 1,024 of them, and the first answer of an export.

    python -m benchmarks.serving_latency [--export=FOLDER] --out=FILE.json

Models are of the Toys recipe with random parameters, FAME beside SASRec, over random catalogues;
histories are as long as those of Toys. Contenders take turns, a few calls at a time, after every
shape has been compiled:

    FAME, SASRec          Recommender.recommend; of many, Recommender.recommend_all
    ... on the device     the same without what Python does before and after, rows lying there
    ... encode            the query alone
    ... scores            query and scores as evaluate.rank_users has them, without a top-k
    rows                  what Python does before the device: ids to numbers, numbers to rows
    query given           scores and top-k alone, on the device
    FAISS                 IndexFlatIP with the same queries, items and top-k; nothing is masked

Of one history p50, p90 and p99 are of single calls; of many, median, P10 and P90 are of all of them
together. The first answer is of a process of its own, from the interpreter's start; without
--export it is of FAME as measured here. Others is the share of the processor that others used.
Runs unchanged on CPU and CUDA.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.baselines_throughput import ROOT, others_seconds
from benchmarks.machine import processor
from benchmarks.serving_bench import RECIPE, TOP_K, Bench
from fame_jax import export
from fame_jax import run as run_lib

TURN = 10  # calls of a contender before the next one has its turn

FIRST_ANSWER = """
import time
began = time.perf_counter()
import json, sys
from fame_jax import serve
imported = time.perf_counter()
recommender = serve.load_export(sys.argv[1])
loaded = time.perf_counter()
history = recommender.item_ids[1:7]
recommender.recommend(history, int(sys.argv[2]))
answered, at = time.perf_counter(), time.time()
times = []
for _ in range(51):
    start = time.perf_counter()
    recommender.recommend(history, int(sys.argv[2]))
    times.append(time.perf_counter() - start)
print(json.dumps({
    'import': imported - began, 'load': loaded - imported, 'first': answered - loaded, 'at': at,
    'later_ms': 1e3 * sorted(times)[25],
}))
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--export', default='', help='folder whose first answer is timed')
    parser.add_argument('--out', type=Path, help='where to write the figures, .json')
    parser.add_argument('--items', default='12000,1000000', help='sizes of the catalogues')
    parser.add_argument('--calls', type=int, default=500, help='of one history, each contender')
    parser.add_argument('--batches', type=int, default=10, help='of many, each contender')
    parser.add_argument('--batch', type=int, default=1024, help='how many are many')
    parser.add_argument('--starts', type=int, default=5, help='fresh processes')
    return parser.parse_args(argv)


def take_turns(contenders, calls, warm):
    """Seconds of each call of each contender, after calls of `warm`; calls are of a range."""
    for call in contenders.values():
        for i in warm:
            call(i)
    times = {name: [] for name in contenders}
    for begin in range(0, len(calls), TURN):
        for name, call in contenders.items():
            for i in calls[begin : begin + TURN]:
                began = time.perf_counter()
                call(i)
                times[name].append(time.perf_counter() - began)
    return times


def percentiles(times, wanted):
    """{'p50': ms, ...} of each contender."""
    return {
        name: {f'p{p}': 1e3 * float(np.percentile(several, p)) for p in wanted}
        for name, several in times.items()
    }


def ratios(found):
    """Medians against medians, of one history or of many."""
    pairs = {
        'FAME / SASRec': ('FAME', 'SASRec'),
        'FAME / on the device': ('FAME', 'FAME on the device'),
        'FAME / scores alone': ('FAME', 'FAME scores'),
        'FAME / FAISS': ('FAME', 'FAISS'),
        'query given / FAISS': ('query given', 'FAISS'),
    }
    return {name: found[a]['p50'] / found[b]['p50'] for name, (a, b) in pairs.items() if b in found}


def measure(num_items, arguments):
    """The figures of one catalogue, and FAME's recommender."""
    bench = Bench(num_items, arguments.batch)
    calls = [i % arguments.batch for i in range(arguments.calls)]
    one = percentiles(take_turns(bench.one(), calls, bench.one_of_each_shape()), (50, 90, 99))
    times = take_turns(bench.together(), range(arguments.batches), [0])
    many = percentiles(times, (10, 50, 90))
    for of_name in many.values():
        of_name['histories_per_second'] = 1e3 * arguments.batch / of_name['p50']
    found = {
        'items': num_items,
        'histories': arguments.batch,
        'on_the_device_at_a_time': bench.chunk,
        'one_history_ms': one,
        'one_history_ratios': ratios(one),
        'all_histories_ms': many,
        'all_histories_ratios': ratios(many),
        'faiss_agrees': bench.agreement(),
    }
    return found, bench.recommenders['fame']


def first_answer(folder, starts):
    """Seconds from the start of a process to its first answer, and what they are of; medians."""
    command = [sys.executable, '-c', FIRST_ANSWER, str(Path(folder).resolve()), str(TOP_K)]
    found = []
    for _ in range(starts):
        began = time.time()
        ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        told = json.loads(ended.stdout)
        found.append({**told, 'to_first_answer': told['at'] - began})
    names = ('to_first_answer', 'import', 'load', 'first', 'later_ms')
    medians = {name: float(np.median([one[name] for one in found])) for name in names}
    return medians | {'to_first_answer_all': [one['to_first_answer'] for one in found]}


def first_answers(of_items, arguments):
    """What of_items (size -> recommender) take as exports, or what --export does, by name."""
    if arguments.export:
        name = Path(arguments.export).name
        return {name: first_answer(arguments.export, arguments.starts)}
    found = {}
    for num_items, made in of_items.items():
        with tempfile.TemporaryDirectory() as folder:
            export.save(made, Path(folder) / 'export')
            name = f'FAME, {num_items:,} items'
            found[name] = first_answer(Path(folder) / 'export', arguments.starts)
    return found


def tables(told):
    """Figures as Markdown."""
    lines = []
    for found in told['catalogues']:
        one, many = found['one_history_ms'], found['all_histories_ms']
        lines += [
            f'\n{found["items"]:,} items, {found["on_the_device_at_a_time"]} of '
            f'{found["histories"]:,} histories on the device at a time\n',
            '| | one: p50 ms | p90 | p99 | all: median ms (P10 - P90) | histories/s |',
            '|---|---|---|---|---|---|',
        ]
        for name in one:
            a, b = one[name], many[name]
            lines.append(
                f'| {name} | {a["p50"]:.3f} | {a["p90"]:.3f} | {a["p99"]:.3f} | '
                f'{b["p50"]:.1f} ({b["p10"]:.1f} - {b["p90"]:.1f}) | '
                f'{b["histories_per_second"]:,.0f} |'
            )
        lines += ['\n| ratio of medians | one | all |', '|---|---|---|']
        for name, ratio in found['one_history_ratios'].items():
            lines.append(f'| {name} | {ratio:.2f} | {found["all_histories_ratios"][name]:.2f} |')
    lines += [
        '\n| first answer | s | import | load | answer | later, ms |',
        '|---|---|---|---|---|---|',
    ]
    for name, found in told['first_answer'].items():
        parts = ' | '.join(f'{found[part]:.2f}' for part in ('import', 'load', 'first'))
        lines.append(
            f'| {name} | {found["to_first_answer"]:.2f} | {parts} | {found["later_ms"]:.2f} |'
        )
    return '\n'.join(lines)


def main(argv):
    """Measures and prints."""
    arguments = parse_arguments(argv)
    began, others, load = time.perf_counter(), others_seconds(), os.getloadavg()[0]
    catalogues, served = [], {}
    for num_items in map(int, arguments.items.split(',')):
        found, made = measure(num_items, arguments)
        catalogues.append(found)
        served |= {} if arguments.export else {num_items: made}
    told = {
        'machine': run_lib.machine() | {'processor': processor()},
        'load': load,
        'recipe': RECIPE,
        'top_k': TOP_K,
        'calls': arguments.calls,
        'batches': arguments.batches,
        'catalogues': catalogues,
        'first_answer': first_answers(served, arguments),
    }
    seconds = time.perf_counter() - began
    told['others'] = (others_seconds() - others) / seconds / run_lib.cores()
    print(tables(told))
    print(f'\nothers: {100 * told["others"]:.0f} % of the processor')
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(told, indent=2) + '\n')
    return told


if __name__ == '__main__':
    main(sys.argv[1:])
