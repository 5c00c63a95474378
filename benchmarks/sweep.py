"""The FAME paper's Figures 5 and 6: quality against heads, and against experts.

    python -m benchmarks.sweep --dataset=toys --heads=1,2,4,8,16 --experts=1,2,4,8,16,32 \\
        --seeds=0,1,2 --data_dir=DATA

Figure 5 is SASRec and FAME without MoE (one expert) over heads; Figure 6 is FAME over experts, with
--at_heads heads in every model. A run is a process of its own, `python -m fame_jax.main`, in
FOLDER/DATASET/MODEL_seedN, with its screen in a .log beside it; FAME takes the SASRec of the same
heads and seed for its backbone. What is there is not run again, what is half done goes on, and what
fails holds up nothing but what needs it. Ctrl-C and SIGTERM are passed on: the runs save, and the
same command goes on from there; more seeds, heads or experts can be asked for later.

FOLDER/DATASET then holds sweep.md, sweep.json (all that is told, and per seed), sweep.svg and .png.
Every run's epoch is chosen on validation, and so is the best of each line.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import series, sweep_page, verdict
from benchmarks.children import Process, say
from benchmarks.runs import Run
from fame_jax import records

NAME = 'benchmarks.sweep'
OWN = (*series.OWN, 'num_heads', 'num_experts')
HEADS, EXPERTS = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32)
QUICK = {'heads': (1, 2, 4), 'experts': (1, 2, 4), 'seeds': (0, 1), 'folder': 'runs/sweep_quick'}


@dataclasses.dataclass(frozen=True)
class Point(Run):
    """A run at a place of a line; experts is None where a model has none."""

    heads: int = 1
    experts: int | None = None


def main(argv: Sequence[str], start: Callable[[Run, int], Process] | None = None) -> int:
    """Runs what is missing, draws and returns the exit code, as `series.main` has it."""
    return series.main(argv, parse, plan, tell, start)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; those that --quick sets can be given beside it.

    Raises:
      UserError: on an unknown flag or a value that cannot be.
    """
    preset = QUICK if '--quick' in argv else {'seeds': (0, 1, 2), 'folder': 'runs/sweep'}
    parser, add = series.parser(NAME, __doc__, preset)
    add('--dataset', default='synthetic' if '--quick' in argv else 'toys')
    add('--heads', type=series.numbers, default=preset.get('heads', HEADS), help='of Figure 5')
    add('--experts', type=series.numbers, default=preset.get('experts', EXPERTS), help='a head')
    add('--at_heads', type=int, default=2, help='heads of all models of Figure 6')
    return series.read(parser, argv, OWN)


def plan(options: argparse.Namespace) -> list[Point]:
    """The runs in their order: all of a seed before the next, each backbone before its FAME."""
    heads = sorted({*options.heads, options.at_heads})
    experts = sorted({*options.experts, 1} - {1})
    places: list[tuple[int, int | None]] = [(h, n) for h in heads for n in (None, 1)]
    places += [(options.at_heads, n) for n in experts]
    return [_point(options, seed, *place) for seed in options.seeds for place in places]


def _point(options: argparse.Namespace, seed: int, heads: int, experts: int | None) -> Point:
    folder = series.folder_of(options, options.dataset)
    backbone = folder / f'sasrec_h{heads}_seed{seed}'
    model, workdir, needs, more = 'sasrec', backbone, None, [f'--num_heads={heads}']
    if experts is not None:
        model, workdir = 'fame', folder / f'fame_h{heads}_n{experts}_seed{seed}'
        needs, more = backbone, [*more, f'--num_experts={experts}']
    flags = series.flags(options, options.dataset, model, seed, workdir, needs)
    return Point(
        options.dataset, model, seed, workdir, (*flags, *more), needs, heads=heads, experts=experts
    )


def tell(options: argparse.Namespace, runs: Sequence[Point]) -> bool:
    """Writes the figures, if any run is done."""
    done = [run for run in runs if run.done()]
    if done:
        folder = series.folder_of(options, options.dataset)
        write({'command': command(options), **collect(options, runs, done)}, folder)
    return bool(done)


def command(options: argparse.Namespace) -> str:
    """The command that makes the figures, without what changes none."""
    lists = {'heads': options.heads, 'experts': options.experts}
    return series.command(
        NAME,
        options,
        f'--dataset={options.dataset}',
        *(f'--{name}={",".join(map(str, values))}' for name, values in lists.items()),
        f'--at_heads={options.at_heads}',
    )


def collect(
    options: argparse.Namespace, runs: Sequence[Point], done: Sequence[Point]
) -> dict[str, Any]:
    """All that the page and the picture tell, of those runs that are done.

    Returns:
      A dict of plain values: dataset, card, heads and experts (ascending), at_heads, popularity,
      points (as `verdict.row_of` has them, with heads and experts), and missing.

    Raises:
      UserError: when two runs are of different data.
    """
    told = verdict.read(done)
    places: dict[tuple, dict[Run, Any]] = {}
    for run in sorted(done, key=lambda run: (run.model == 'fame', run.heads, run.experts or 0)):
        places.setdefault((run.model, run.heads, run.experts), {})[run] = told[run]
    first = told[done[0]]
    return {
        'dataset': options.dataset,
        'card': first['card']['dataset'],
        'heads': sorted(options.heads),
        'experts': sorted(options.experts),
        'at_heads': options.at_heads,
        'chosen_by': f'validation {verdict.SELECT_ON}, masked',
        'popularity': first['results']['popularity'],
        'points': [_told(place, found) for place, found in places.items()],
        'missing': [run.workdir.name for run in runs if run not in told],
    }


def _told(place: tuple, found: dict[Run, Any]) -> dict[str, Any]:
    """The figures of a place over its seeds."""
    model, heads, experts = place
    by_seed = dict(sorted(found.items(), key=lambda pair: pair[0].seed))
    name = {None: sweep_page.SASREC, 1: sweep_page.PLAIN}.get(experts, sweep_page.FAME)
    return {**verdict.row_of(model, by_seed), 'title': name, 'heads': heads, 'experts': experts}


def write(sweep: dict[str, Any], folder: Path) -> None:
    """Writes sweep.json, .md, .svg and .png."""
    records.write_json(folder / 'sweep.json', sweep)
    records.write_text(folder / 'sweep.md', sweep_page.markdown(sweep))
    for suffix in ('svg', 'png'):
        sweep_page.draw(sweep, folder / f'sweep.{suffix}')
    say(f'the sweep is in {folder / "sweep.md"}, with .json, .svg and .png beside it')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
