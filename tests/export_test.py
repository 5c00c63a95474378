"""An export gives what the run gives, loads without the training code, and shows any change."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from serve_test import tiny_run  # noqa: F401

from fame_jax import export, serve, serving
from fame_jax.errors import UserError
from fame_jax.explain import explain
from fame_jax.models.build import MODELS

ROOT = Path(__file__).parent.parent
# FAME, several queries with a combination of their own, and a bias beside the item's vector.
QUICK = ('fame', 'atten_mixer', 'bert4rec')


def recommender_of(run, module, params):
    model = serving.model_of(module, params, run.config.max_length)
    count_V = np.bincount(run.data.items, minlength=run.data.num_items + 1)
    titles = ['', *(f'title {n}' for n in range(1, run.data.num_items + 1))]
    return serve.Recommender(model, run.data.item_ids, count_V, titles, {'model': 'a test'})


def histories_of(run):
    """Histories of the data set, and odd ones: nobody's, empty, a repeated one, a long one."""
    data = run.data
    found = [
        [data.item_ids[item] for item in data.items[start:end]]
        for start, end in zip(data.offsets[:-1], data.offsets[1:])
    ]
    return [*found, ['nobody knows it'], [], [data.item_ids[3]] * 5, data.item_ids[1:] * 3]


@pytest.mark.parametrize(
    'model', [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_an_export_answers_as_the_run_bit_for_bit(model, tiny_run, tmp_path):  # noqa: F811
    run, module, params = tiny_run(model)
    ours = recommender_of(run, module, params)
    export.save(ours, tmp_path / 'export')
    theirs = serve.load_export(tmp_path / 'export')
    assert (theirs.titles, theirs.item_ids) == (ours.titles, ours.item_ids)
    histories = histories_of(run)
    assert list(theirs.recommend_all(histories, 7)) == list(ours.recommend_all(histories, 7))
    mine, other = explain(ours, histories[0], 5), explain(theirs, histories[0], 5)
    assert ('heads' in mine) == ('heads' in other) == (model in ('fame', 'fame_bert4rec'))
    close(mine | {'model': ''}, other | {'model': ''})


def close(one, other):
    """The same plain values, floats to a few digits: other batches round otherwise."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one.keys() - {'identity'}:
            close(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            close(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    else:
        assert one == other


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder with the smallest export, of a model that is its last item's vector."""
    from serve_test import make

    folder = tmp_path_factory.mktemp('small') / 'export'
    export.save(make()[0], folder)
    return folder


def test_faiss_finds_the_same(exported):
    faiss = pytest.importorskip('faiss')
    recommender = serve.load_export(exported)
    model = recommender.model
    index = faiss.read_index(str(exported / 'items.faiss'))
    for token in recommender.item_ids[1:]:
        items, _ = recommender.numbers([token])
        row = np.array([[0, 0, 0, items[0]]], np.int32)
        query_BD = np.asarray(model.encode(model.params, row, row * 0, np.sign(row)))[:, 0]
        score_BK, item_BK = index.search(query_BD, 5)
        answer = recommender.recommend([token], 5, filter_seen=False)
        assert [recommender.item_ids[item] for item in item_BK[0]] == answer.items
        np.testing.assert_allclose(score_BK[0], answer.scores, rtol=1e-5)


def test_it_loads_where_nothing_of_training_can_be_imported(exported):
    code = f"""
        import sys

        class Wall:
            def find_spec(self, name, path=None, target=None):
                barred = ('optax', 'orbax', 'grain', 'absl', 'flax', 'tensorboardX', 'polars')
                if name.split('.')[0] in barred or name.startswith('fame_jax.train'):
                    raise ImportError(f'{{name}} is barred here')

        sys.meta_path.insert(0, Wall())
        from fame_jax import serve

        answer = serve.load_export({str(exported)!r}).recommend(['a', 'b'], 3)
        print(answer.items)
    """
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == serve.load_export(exported).recommend(['a', 'b'], 3).items


def copy(exported, tmp_path):
    folder = tmp_path / 'copy'
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def files_of(exported):
    return sorted(path.name for path in exported.iterdir())


def test_the_checksums_are_those_of_sha256sum(exported):
    done = subprocess.run(
        ['sha256sum', '-c', '--strict', serve.SUMS], cwd=exported, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('OK') == len(files_of(exported)) - 1


@pytest.mark.parametrize('how', ['flipped', 'cut', 'gone'])
def test_a_changed_file_is_refused_in_one_line(exported, tmp_path, how):
    for name in files_of(exported):
        folder = copy(exported, tmp_path / name) if (tmp_path / name).mkdir() is None else None
        whole = (folder / name).read_bytes()
        if how == 'gone':
            (folder / name).unlink()
        elif how == 'cut':
            (folder / name).write_bytes(whole[: len(whole) // 2])
        else:
            (folder / name).write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
        with pytest.raises(UserError) as refusal:
            serve.load_export(folder)
        assert str(folder) in str(refusal.value) and '\n' not in str(refusal.value)


def resum(folder):
    (folder / serve.SUMS).unlink()
    export._write_sums(folder)


def test_nothing_is_unpickled(exported, tmp_path):
    """A file with an object in it, its checksum made to fit: refused, and the object not made."""
    folder = copy(exported, tmp_path)
    trace = tmp_path / 'unpickled'

    class Bomb:
        def __reduce__(self):
            return (open, (str(trace), 'w'))

    for name in ('popularity.npy', 'items.npy'):
        np.save(folder / name, np.array([Bomb()], object), allow_pickle=True)
        resum(folder)
        with pytest.raises(UserError, match='no export'):
            serve.load_export(folder)
        assert not trace.exists()


def test_another_format_is_told(exported, tmp_path):
    folder = copy(exported, tmp_path)
    card = json.loads((folder / 'card.json').read_text())
    (folder / 'card.json').write_text(json.dumps(card | {'format': 99}))
    resum(folder)
    with pytest.raises(UserError, match='format 99'):
        serve.load_export(folder)


def test_a_folder_that_is_no_export(tmp_path):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        with pytest.raises(UserError, match='no export'):
            serve.load_export(folder)


def test_an_export_is_replaced_and_nothing_else(exported, tmp_path):
    recommender = serve.load_export(exported)
    export.save(recommender, tmp_path / 'e')
    export.save(recommender, tmp_path / 'e')
    assert files_of(tmp_path / 'e') == files_of(exported)
    assert [path.name for path in tmp_path.iterdir()] == ['e']
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').write_text('years')
    with pytest.raises(UserError, match='holds something else'):
        export.save(recommender, tmp_path / 'other')
    assert (tmp_path / 'other' / 'thesis.tex').read_text() == 'years'


def test_programs_are_for_cpu_and_cuda(exported):
    from jax import export as jax_export

    program = jax_export.deserialize(bytearray((exported / 'encode_4.stablehlo').read_bytes()))
    assert program.platforms == ('cpu', 'cuda')
    assert program.in_avals[1].shape[0] != 1 and not isinstance(program.in_avals[1].shape[0], int)
    assert jax.default_backend() in program.platforms
