"""A stage compiles all of its programs before its second epoch, and several seeds share them."""

import collections
import itertools
import re
import threading

import jax
import numpy as np
import pytest
from run_fixtures import SMALL_RUN, open_tiny_run

from fame_jax import run_dir
from fame_jax.evaluation.ranker import Ranker
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.stages import initialize
from fame_jax.stages.open_recommender import serving_model


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


def count_compiled(caplog, arguments):
    """Programs that XLA compiles in this thread in a command, by the names of their functions."""
    caplog.clear()
    with jax.log_compiles():
        assert main(arguments) == 0
    names = re.findall(r'Finished XLA compilation of jit\((\w+)\)', caplog.text)
    return collections.Counter(names)


def test_three_seeds_compile_no_more_than_one(tmp_path, caplog):
    """The seeds train one after the other; in both commands each program is compiled anew."""
    epochs = ['--pretrain_epochs=1', '--finetune_epochs=1', '--members=loop']
    one, three = (
        count_compiled(caplog, [*SMALL_RUN, *epochs, f'--seeds={seeds}', f'--workdir={folder}'])
        for seeds, folder in (('5', tmp_path / 'one'), ('5,6,7', tmp_path / 'three'))
    )
    assert one['init_params'] == 2  # of two stages
    for name in ('init_params', 'init_fn', '_rank_rows', '_encode_rows', 'copy'):
        assert three[name] <= one[name], name


def test_equal_modules_are_served_by_the_same_functions(tmp_path):
    run, module, params = open_tiny_run('fame', tmp_path)
    first, second = (serving_model(m, params, 10) for m in (module, module.clone()))
    assert first.encode is second.encode and first.intermediates is second.intermediates
    other = serving_model(module.clone(similarity='dot'), params, 10)
    assert other.encode is not first.encode
    run.close()


def test_initial_parameters_are_those_of_the_key(tmp_path):
    run, module, _ = open_tiny_run('sasrec', tmp_path)
    keys = jax.random.split(jax.random.key(3))
    drawn = [initialize.draw_params(run, 'pretrain', module, key) for key in keys]
    for params, key in zip(drawn, keys):
        expected = registry.init_params(module, jax.random.fold_in(key, 0))
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert not np.array_equal(drawn[0]['item_table'], drawn[1]['item_table'])
    run.close()


@pytest.mark.parametrize('model, tables', [('fame', {'item_table'}), ('bert4rec', None)])
def test_of_a_grown_model_only_the_tables_are_drawn(tmp_path, model, tables):
    """The grown vector of the items has the length of other vectors, the width of the model."""
    run, module, _ = open_tiny_run(model, tmp_path)
    key, grown = jax.random.key(0), module.clone(num_items=module.width - 1)
    old = registry.init_params(module.clone(num_items=3), key)
    drawn = initialize.draw_grown_params(grown, old, key)
    expected = registry.init_params(grown, jax.random.fold_in(key, 0))
    assert jax.tree.structure(drawn) == jax.tree.structure(expected)
    for name, leaf in drawn.items():
        if name in (tables or {'item_table', 'item_bias'}):
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-6)
        else:
            shapes = [(each.shape, type(each)) for each in jax.tree.leaves(leaf)]
            wanted = [each.shape for each in jax.tree.leaves(expected[name])]
            assert shapes == [(shape, jax.ShapeDtypeStruct) for shape in wanted], name
    run.close()
