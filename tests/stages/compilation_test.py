"""A stage compiles all of its programs before its second epoch."""

import itertools
import threading

import jax
from run_fixtures import SMALL_RUN

from fame_jax import run_dir
from fame_jax.evaluation.ranker import Ranker
from fame_jax.main import main


def test_nothing_is_compiled_after_the_first_epoch_of_a_stage(tmp_path, monkeypatch):
    """Counted by JAX, whatever part of the program compiles.

    Threads of earlier tests do not count: a run that has ended does not wait for the program that
    its thread is compiling.
    """
    here = threading.current_thread()
    strangers = {*threading.enumerate()} - {here}
    compiled, lines = [], []

    def listen(name, *_, **__):
        if 'backend_compile' in name and threading.current_thread() not in strangers:
            compiled.append(threading.current_thread())

    append = run_dir.Metrics.append

    def count(self, **line):
        lines.append((line['stage'], line['epoch'], compiled.count(here), len(compiled)))
        append(self, **line)

    monkeypatch.setattr(run_dir.Metrics, 'append', count)
    # Every epoch is the best so far, so that the first one compiles the copy of its parameters.
    scores, metrics = itertools.count(), Ranker.metrics
    monkeypatch.setattr(
        Ranker, 'metrics', lambda *args: metrics(*args) | {'ndcg@20': float(next(scores))}
    )
    epochs = ['--pretrain_epochs=3', '--finetune_epochs=3', f'--workdir={tmp_path}']
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert main([*SMALL_RUN, *epochs, '--stages=prepare,pretrain,finetune']) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    counts = {
        stage: [numbers for name, epoch, *numbers in lines if name == stage and epoch]
        for stage in ('pretrain', 'finetune')
    }
    assert len(counts['pretrain']) == len(counts['finetune']) == 2 * 3
    # While the backbone trains, the other thread compiles what fine-tuning needs.
    assert len({of_here for of_here, _ in counts['pretrain']}) == 1
    assert len({tuple(both) for both in counts['finetune']}) == 1
    assert min(min(both) for both in counts['finetune']) > 0
