"""An export answers as its run, loads without training code, and any change of it is refused."""

import ast
import importlib.util
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from fixtures import ROOT, run_python
from run_fixtures import histories_of, last_item, make_fame, make_recommender, recommender_of

from fame_jax.errors import UserError
from fame_jax.models.registry import MODELS
from fame_jax.serving import export, onnx_model

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')
# FAME and its backbone, a recurrent model, and one with several queries and their combination.
QUICK = ('fame', 'sasrec', 'gru4rec', 'msgifsr')


def best_by_onnx(folder, recommender, histories, k=20):
    """The k best items and their scores of each history, by ONNX Runtime, as any service would."""
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(str(folder / 'model.onnx'))
    width = session.get_inputs()[0].shape[1]
    items_BL = np.zeros((len(histories), width), np.int32)
    for row, history in enumerate(histories):
        indices, _ = recommender.to_indices(history)
        indices = indices[-width:]
        items_BL[row, : len(indices)] = indices
    (score_BV,) = session.run(None, {'items': items_BL})
    (of_one,) = session.run(None, {'items': items_BL[:1]})
    np.testing.assert_allclose(of_one, score_BV[:1], rtol=1e-4, atol=1e-5)
    assert (score_BV[:, 0] == -np.inf).all()
    order_BK = np.argsort(-score_BV, axis=1, kind='stable')[:, :k]
    return order_BK, score_BV


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
    if importlib.util.find_spec('onnx'):
        # An item may stand before another of an equal score.
        order_BK, score_BV = best_by_onnx(tmp_path / 'export', ours, histories)
        answers = ours.recommend_many(histories, 20, filter_seen=False)
        for order_K, score_V, answer in zip(order_BK, score_BV, answers):
            np.testing.assert_allclose(score_V[order_K], answer.scores, rtol=1e-4, atol=1e-5)
            indices, _ = ours.to_indices(answer.items)
            np.testing.assert_allclose(score_V[indices], answer.scores, rtol=1e-4, atol=1e-5)
    query_QD = ours.query(histories[0])
    np.testing.assert_allclose(loaded.query(histories[0]), query_QD, rtol=1e-4, atol=1e-5)
    assert (loaded.model.intermediates is not None) == ('fame' in model)
    if 'fame' in model:
        explanations = [each.explain(histories[0], 5) for each in (loaded, ours)]
        (head, *_), (own_head, *_) = (explanation.heads for explanation in explanations)
        assert [e['item'] for e in head['top']] == [e['item'] for e in own_head['top']]
        np.testing.assert_allclose(explanations[0].carried, explanations[1].carried, rtol=1e-4)
        similar = [each.similar_items(ours.item_ids[3], 5, 2) for each in (loaded, ours)]
        names = [f'head {h}' for h in range(1, 5 if 'branched' in model else 3)]
        assert similar[0] == similar[1] and loaded.facets == ours.facets == names
    has_views = 'fame' in model or 'branched' in model
    assert (loaded.model.facet_HDK is not None) == has_views


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


def test_an_export_of_version_0_2_is_read_without_heads(tmp_path):
    """It has no facets.npy, and its card names no heads."""
    make_fame(head_names=['brand', 'genre']).export(tmp_path / 'e')
    card = json.loads((tmp_path / 'e' / 'card.json').read_text())
    assert card.pop('heads') == ['brand', 'genre'] and 'onnx' in card
    (tmp_path / 'e' / 'card.json').write_text(json.dumps(card))
    (tmp_path / 'e' / 'facets.npy').unlink()
    (tmp_path / 'e' / 'model.onnx').unlink(missing_ok=True)
    export.write_sums(tmp_path / 'e')
    old = export.load(tmp_path / 'e')
    assert old.similar_items('a', 3).items == make_fame().similar_items('a', 3).items
    with pytest.raises(ValueError, match="by='brand': the export is of an older version"):
        old.similar_items('a', 3, 'brand')
    assert [head['name'] for head in old.explain(['a'], 2).heads] == ['head 1', 'head 2']
    with pytest.warns(UserWarning, match=r'no model.onnx: the export .* has none'):
        old.export(tmp_path / 'again')


@pytest.mark.parametrize(
    'change',
    [
        {'heads': ['brand']},
        {'heads': ['brand', 'brand']},
        {'heads': ['all', 'brand']},
        {'heads': [1, 2]},
        {'heads': 'ab'},
    ],
)
def test_heads_that_do_not_fit_are_refused(change, tmp_path):
    make_fame().export(tmp_path / 'e')
    card = json.loads((tmp_path / 'e' / 'card.json').read_text())
    (tmp_path / 'e' / 'card.json').write_text(json.dumps(card | change))
    export.write_sums(tmp_path / 'e')
    with pytest.raises(UserError, match='not an export'):
        export.load(tmp_path / 'e')


# model.onnx


def test_items_may_stand_anywhere_in_a_row(tmp_path):
    """Entries that are no index are skipped, and a row without items gets the popular ones."""
    pytest.importorskip('onnx')
    recommender, *_ = make_recommender()
    recommender.export(tmp_path / 'e')
    session = pytest.importorskip('onnxruntime').InferenceSession(str(tmp_path / 'e/model.onnx'))
    rows = [[0, 0, 3, 5], [3, 5, 0, 0], [3, 0, 0, 5], [-1, 3, 99, 5], [0, 0, 0, 0]]
    (score_BV,) = session.run(['scores'], {'items': np.array(rows, np.int32)})
    for row in score_BV[1:4]:
        np.testing.assert_array_equal(row, score_BV[0])
    np.testing.assert_array_equal(score_BV[4, 1:], recommender.count_V[1:])
    card = json.loads((tmp_path / 'e' / 'card.json').read_text())
    assert card['onnx'] == {'opset': 18}


def test_an_export_without_model_onnx_is_whole_and_says_why(tmp_path, monkeypatch):
    """Where onnx is missing, an operation has no rule, or the scores would be others."""
    pytest.importorskip('onnx')

    def loop(params, *rows):
        count = jax.lax.while_loop(lambda n: n < 3, lambda n: n + 1, rows[0].sum() * 0)
        return last_item(params, *rows) * count

    def missing(name):
        return None if name == 'onnx' else find_spec(name)

    find_spec = importlib.util.find_spec
    cases = [
        (loop, 'no rule for the operation while', lambda patch: None),
        (last_item, r"pip install 'fame_jax\[onnx\]'", lambda patch: patch.setattr(
            importlib.util, 'find_spec', missing
        )),
        (last_item, 'would differ by', lambda patch: patch.setattr(
            onnx_model, 'TOLERANCE', {'float32': -1}
        )),
    ]  # fmt: skip
    for number, (encode, words, change) in enumerate(cases):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.warns(UserWarning, match=words):
                make_recommender(encode)[0].export(folder)
        assert 'model.onnx' not in names_of(folder)
        assert json.loads((folder / 'card.json').read_text())['onnx'] is None
        assert export.load(folder).recommend(['a'], 3).items


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
