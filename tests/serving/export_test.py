"""An export answers as its run, loads without training code, and any change of it is refused."""

import ast
import json
import shutil
import subprocess

import numpy as np
import pytest
from fixtures import ROOT, run_python
from run_fixtures import histories_of, make_recommender, recommender_of

from fame_jax.errors import UserError
from fame_jax.models.registry import MODELS
from fame_jax.serving import export

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')
# FAME, and a model with several queries and their combination.
QUICK = ('fame', 'msgifsr')


@pytest.mark.parametrize(
    'model', [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_an_export_answers_as_the_run_bit_for_bit(model, tiny_run, tmp_path):
    run, module, params = tiny_run(model)
    ours = recommender_of(run, module, params)
    ours.export(tmp_path / 'export')
    loaded = export.load(tmp_path / 'export')
    assert (loaded.titles, loaded.item_ids) == (ours.titles, ours.item_ids)
    histories = histories_of(run)
    assert list(loaded.recommend_many(histories, 7)) == list(ours.recommend_many(histories, 7))
    query_QD = ours.query(histories[0])
    np.testing.assert_allclose(loaded.query(histories[0]), query_QD, rtol=1e-4, atol=1e-5)
    assert (loaded.model.intermediates is not None) == ('fame' in model)
    if 'fame' in model:
        explanations = [each.explain(histories[0], 5) for each in (loaded, ours)]
        (head, *_), (own_head, *_) = (explanation.heads for explanation in explanations)
        assert [e['item'] for e in head['top']] == [e['item'] for e in own_head['top']]
        np.testing.assert_allclose(explanations[0].carried, explanations[1].carried, rtol=1e-4)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """An exported model whose query is its last item's vector."""
    folder = tmp_path_factory.mktemp('small') / 'export'
    make_recommender()[0].export(folder)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported, tmp_path / 'copy')


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('id_type', ['str', 'int'])
def test_ids_keep_their_type(tmp_path, id_type):
    ids = ['', '7', '12', *map(str, range(40, 50))]
    made, *_ = make_recommender(item_ids=ids, count_V=np.ones(13, int), id_type=id_type)
    made.export(tmp_path / 'export')
    items = export.load(tmp_path / 'export').recommend([7]).items
    assert {*items} == {'str': {*ids[2:]}, 'int': {12, *range(40, 50)}}[id_type]


def test_an_export_of_version_0_1_is_read(copy):
    """Its ids.json has no type of the ids."""
    ids = json.loads((copy / 'ids.json').read_text())
    assert ids.pop('type') == 'str'
    (copy / 'ids.json').write_text(json.dumps(ids))
    export.write_sums(copy)
    assert export.load(copy).recommend(['a'], 2).items


def test_faiss_finds_the_same(exported):
    faiss = pytest.importorskip('faiss')
    recommender = export.load(exported)
    index = faiss.read_index(str(exported / 'items.faiss'))
    for item in recommender.item_ids[1:]:
        score_QK, index_QK = index.search(recommender.query([item]), 5)
        answer = recommender.recommend([item], 5, filter_seen=False)
        assert recommender.to_ids(index_QK[0]) == answer.items
        np.testing.assert_allclose(score_QK[0], answer.scores, rtol=1e-5)


def test_it_loads_where_no_training_code_can_be_imported(exported):
    code = f"""
        import sys

        BARRED = ('optax', 'orbax', 'grain', 'absl', 'flax', 'tensorboardX', 'polars', 'matplotlib')
        FOLDERS = ('training', 'models', 'losses', 'stages', 'config', 'report', 'text')

        class Wall:
            def find_spec(self, name, path=None, target=None):
                top, _, rest = name.partition('.')
                if top in BARRED or top == 'fame_jax' and rest.split('.')[0] in FOLDERS:
                    raise ImportError(f'{{name}} is barred here')

        sys.meta_path.insert(0, Wall())
        from fame_jax.serving import export

        recommender = export.load({str(exported)!r})
        recommender.explain(['a', 'b'], 3), recommender.similar_items('a')
        print(recommender.recommend(['a', 'b'], 3).items)
    """
    assert (
        ast.literal_eval(run_python(code)) == export.load(exported).recommend(['a', 'b'], 3).items
    )


def test_a_full_disk_leaves_the_older_export(tmp_path):
    """In a process that limits the size of its files, which fails as a full disk does."""
    folder = tmp_path / 'export'
    make_recommender()[0].export(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT / 'tests')!r})
        from fame_jax.errors import UserError
        from run_fixtures import make_recommender

        made = make_recommender()[0]
        for most in (0, 300, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            try:
                made.export({str(folder)!r})
            except UserError as error:
                assert str(error).startswith('writing ') and '\\n' not in str(error), error
            else:
                raise AssertionError(most)
    """
    run_python(code)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names_of(tmp_path) == ['export']


# Checksums and faulty files


def test_the_checksums_are_those_of_sha256sum(exported):
    done = subprocess.run(
        ['sha256sum', '-c', '--strict', export.SUMS], cwd=exported, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('OK') == len(names_of(exported)) - 1


@pytest.mark.parametrize('how', ['changed', 'cut', 'missing'])
def test_every_changed_file_is_refused_by_its_name(copy, how):
    for name in names_of(copy):
        path = copy / name
        content = path.read_bytes()
        if how == 'missing':
            path.unlink()
        elif how == 'cut':
            path.write_bytes(content[: len(content) // 2])
        else:
            # A bit of the last byte but one, which all readers of these formats pass over or read.
            path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(UserError) as refusal:
            export.load(copy)
        words = 'SHA-256' if how != 'missing' else 'missing'
        assert words in str(refusal.value) or name == export.SUMS
        assert str(copy) in str(refusal.value) and '\n' not in str(refusal.value)
        path.write_bytes(content)
    export.load(copy)


def test_nothing_is_unpickled(copy, tmp_path):
    """A file with a pickled object and a right checksum is refused, and the object is not made."""
    trace = tmp_path / 'unpickled'

    class Bomb:
        def __reduce__(self):
            return (open, (str(trace), 'w'))

    for name in ('popularity.npy', 'items.npy'):
        np.save(copy / name, np.array([Bomb()], object), allow_pickle=True)
        export.write_sums(copy)
        with pytest.raises(UserError, match='not an export'):
            export.load(copy)
        assert not trace.exists()


def test_another_format_is_refused(copy):
    card = json.loads((copy / 'card.json').read_text())
    (copy / 'card.json').write_text(json.dumps(card | {'format': 99}))
    export.write_sums(copy)
    with pytest.raises(UserError, match='format 99'):
        export.load(copy)


def test_a_folder_that_is_not_an_export(tmp_path):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        with pytest.raises(UserError, match='not an export'):
            export.load(folder)


def test_an_export_is_replaced_and_nothing_else(exported, tmp_path):
    recommender = export.load(exported)
    for _ in range(2):
        recommender.export(tmp_path / 'e')
    assert names_of(tmp_path / 'e') == names_of(exported)
    assert names_of(tmp_path) == ['e']
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').write_text('years')
    with pytest.raises(UserError, match='choose another folder'):
        recommender.export(tmp_path / 'other')
    assert (tmp_path / 'other' / 'thesis.tex').read_text() == 'years'


def test_programs_are_for_cpu_and_cuda_and_any_number_of_rows(exported):
    from jax import export as jax_export

    program = jax_export.deserialize(bytearray((exported / 'encode_4.stablehlo').read_bytes()))
    assert program.platforms == ('cpu', 'cuda')
    assert not isinstance(program.in_avals[1].shape[0], int)
