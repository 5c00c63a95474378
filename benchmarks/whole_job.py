"""Evaluation of all users, and a whole run from data to verdict, stage by stage.

Sections of benchmarks/suite.py.
"""

import contextlib
import dataclasses
import sys
import time
from typing import Any

import jax

from benchmarks.turns import Calls, CompileClock, Effort, contest, spread
from fame_jax import run as run_lib
from fame_jax import stages
from fame_jax.models.build import build, initial
from fame_jax.run import Run

Record = dict[str, Any]


def time_evaluation(base: Run, effort: Effort, deadline: float) -> list[Record]:
    """Ranks of all test users by both protocols, after compilation; a pass is a turn."""

    def make(model: str) -> Calls:
        module = build(model, base.config, base.data.num_items)
        ranks, params = run_lib.Ranker(base, module), initial(module, jax.random.key(0))
        with CompileClock() as clock:
            ranks(params, 'test')
        about = {'items': base.data.num_users, 'compile_seconds': clock.seconds}
        return Calls(lambda: ranks(params, 'test'), warm=0, **about)

    makers = {'SASRec': lambda: make('sasrec'), 'FAME H 2 N 8': lambda: make('fame')}
    return contest(makers, effort._replace(rounds=min(effort.rounds, 3), seconds=0), deadline)


def time_job(base: Run, effort: Effort, deadline: float) -> list[Record]:
    """A run of a few epochs in a folder of its own: seconds of each stage, compilation apart."""
    if time.monotonic() > deadline:
        return [{'name': 'all stages', 'failed': 'left out: the time was up'}]
    # On an accelerator the whole recipe takes less than two epochs on a CPU.
    whole = base.config.pretrain_epochs if jax.default_backend() != 'cpu' else 2
    epochs = 1 if effort.quick else whole
    config = dataclasses.replace(
        base.config,
        workdir=str(base.folder.parent / 'job'),
        pretrain_epochs=epochs,
        finetune_epochs=epochs,
    )
    records = []
    with contextlib.closing(run_lib.open_run(config)) as run:
        for stage in ('prepare', 'pretrain', 'finetune', 'evaluate'):
            began = time.perf_counter()
            with CompileClock() as clock, contextlib.redirect_stdout(sys.stderr):
                stages.STAGES[stage](run)
            took = spread([time.perf_counter() - began])
            name = stage + f', {epochs} epochs' * (stage in run_lib.TRAINED)
            records.append({'name': name, **took, 'compile_seconds': clock.seconds})
    return records
