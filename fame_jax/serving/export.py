"""A trained model as one folder, which serves without its run and without training code.

    card.json            where model and data come from, test metrics, row lengths, versions
    encode_L.stablehlo   (params, tokens, positions, segments) -> queries, for rows of length L
    look_L.stablehlo     the same arguments -> FAME's gate, heads, router and attention; FAME alone
    combine.stablehlo    scores of several queries -> one score; models with several queries alone
    params.npz           the parameters, in the order of the programs' arguments
    items.npy            float32 [V + 1, D], the item vectors
    facets.npy           float32 [H, D, K], the projections of heads or branches; models with these
    items.faiss          the same as a FAISS index of inner products, by item index; if faiss is
                         installed and the model has one query
    model.onnx           items -> scores, for other languages; if onnx is installed: onnx_model.py
    popularity.npy       int64 [V + 1], number of actions by item
    ids.json             item ids, their type in the data, and titles
    SHA256SUMS           checksums of all other files, which `sha256sum -c SHA256SUMS` reads too

The programs are StableHLO for CPU and CUDA, whichever device wrote them, and take any number of
rows. Nothing is pickled. Reading needs jax, numpy and flatbuffers.
"""

import contextlib
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.data import eval_batches
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.serving import onnx_graph, onnx_model
from fame_jax.serving.recommender import DOT, Recommender, ServedModel, single_query

Array = jax.Array

FORMAT = 1
SUMS = 'SHA256SUMS'
REQUIRED = {'card.json', 'ids.json', 'params.npz', 'items.npy', 'popularity.npy'}
PLATFORMS = ('cpu', 'cuda')
ADVICE = 'export the run again'
# Errors where a file contains other values than those of an export.
PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def save(recommender: Recommender, folder: str | Path) -> str:
    """Writes the folder whole or not at all; an older export in it is replaced.

    The recommender must be on one device.

    Returns:
      '', or one line that says why the folder has no model.onnx.

    Raises:
      UserError: if it cannot be written, or holds something that is not an export.
    """
    folder = Path(folder)
    with explain_os_errors(f'writing {folder}', 'choose another folder'):
        if folder.exists() and any(folder.iterdir()) and not (folder / SUMS).is_file():
            raise UserError(
                f'{folder} holds something that is not an export; choose another folder'
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as aside:
            # A subfolder, since the temporary folder itself is closed to other users.
            fresh = Path(aside) / 'fresh'
            fresh.mkdir()
            missing = _write(recommender, fresh)
            if folder.exists():
                folder.rename(Path(aside) / 'old')
            fresh.rename(folder)
    return missing


def load(folder: str | Path) -> Recommender:
    """Reads an exported folder.

    Raises:
      UserError: if a file is missing, was changed or cut short, or has another format.
    """
    folder = Path(folder)
    verify(folder)
    try:
        with explain_os_errors(f'reading {folder}', ADVICE):
            return _read(folder)
    except PARSE_ERRORS as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{folder} is not an export of fame_jax ({reason}); {ADVICE}') from error


def verify(folder: Path) -> None:
    """Compares each file of an export with SHA256SUMS.

    Raises:
      UserError: naming the first file that is missing or differs.
    """
    if not (folder / SUMS).is_file():
        raise UserError(f'{folder} is not an export ({SUMS} is missing); name an exported folder')
    with explain_os_errors(f'reading {folder}', ADVICE):
        lines = (folder / SUMS).read_text('utf-8', errors='replace').splitlines()
        sums = dict(reversed(line.split('  ', 1)) for line in lines if '  ' in line)
        for name in sorted(REQUIRED | set(sums)):
            path = folder / Path(name).name
            if not path.is_file():
                raise UserError(f'{path} is missing; {ADVICE}')
            if _sha256(path) != sums.get(name):
                raise UserError(f'{path} was changed after the export (SHA-256); {ADVICE}')


def _write(recommender: Recommender, folder: Path) -> str:
    """Writes all files; returns a line that says why there is no model.onnx, or ''."""
    model = recommender.model
    leaves, tree = jax.tree.flatten(model.params)
    lengths = eval_batches.row_lengths(model.max_length)
    for length in lengths:
        queries = _write_program(folder, 'encode', model.encode, leaves, tree, length)
        if model.intermediates is not None:
            # The name is that of format 1, whose exports stay readable.
            _write_program(folder, 'look', model.intermediates, leaves, tree, length)
    if queries > 1:
        _write_combine(folder, model, queries)
    np.savez(folder / 'params.npz', **{str(i): np.asarray(x) for i, x in enumerate(leaves)})
    item_VD = np.asarray(model.item_VD)
    np.save(folder / 'items.npy', item_VD)
    if model.facet_HDK is not None:
        np.save(folder / 'facets.npy', np.asarray(model.facet_HDK, np.float32))
    np.save(folder / 'popularity.npy', recommender.count_V.astype(np.int64))
    indexed = queries == 1 and _write_index(item_VD, folder / 'items.faiss')
    missing = onnx_model.write(recommender, folder)
    ids = {'items': recommender.item_ids, 'titles': recommender.titles, 'type': recommender.id_type}
    (folder / 'ids.json').write_text(json.dumps(ids))
    card = recommender.card | {
        'format': FORMAT,
        'lengths': lengths,
        'max_length': model.max_length,
        'queries': queries,
        'facets': model.intermediates is not None,
        'heads': recommender.facets,
        'score_kind': model.score_kind,
        'filter_seen': recommender.filter_seen,
        'faiss': indexed,
        'onnx': None if missing else {'opset': onnx_graph.OPSET},
        'platforms': list(PLATFORMS),
        'exported_with': f'jax {jax.__version__}',
    }
    (folder / 'card.json').write_text(json.dumps(card, indent=2, allow_nan=False) + '\n')
    write_sums(folder)
    return missing


def _read(folder: Path) -> Recommender:
    card = json.loads((folder / 'card.json').read_text('utf-8'))
    if card['format'] != FORMAT:
        raise UserError(
            f'{folder} has export format {card["format"]}, and this version of fame_jax reads '
            f'format {FORMAT}; {ADVICE}'
        )
    ids = json.loads((folder / 'ids.json').read_text('utf-8'))
    with (
        _parsing('params.npz'),
        np.load(folder / 'params.npz', allow_pickle=False) as file,
    ):
        params = [jnp.asarray(file[str(i)]) for i in range(len(file.files))]
    combine = single_query
    if card['queries'] > 1:
        combine = _read_program(folder / 'combine.stablehlo').call
    lengths = card['lengths']
    item_VD = _read_array(folder / 'items.npy')
    count_V = _read_array(folder / 'popularity.npy')
    facet_HDK = None
    if card.get('heads'):  # which exports of version 0.2 and before do not have
        facet_HDK = _read_array(folder / 'facets.npy')
        _check_facets(card, facet_HDK, item_VD)
    _check(ids, card, item_VD, count_V)
    model = ServedModel(
        encode=_read_programs(folder, 'encode', lengths),
        combine=combine,
        params=params,
        item_VD=jnp.asarray(item_VD),
        max_length=card['max_length'],
        intermediates=_read_programs(folder, 'look', lengths) if card['facets'] else None,
        score_kind=card.get('score_kind', DOT),
        onnx_file=folder / onnx_model.FILE,
        facet_HDK=None if facet_HDK is None else jnp.asarray(facet_HDK),
    )
    # Older exports have no type, no kind of scores and no default of filter_seen.
    id_type, filter_seen = ids.get('type', 'str'), card.get('filter_seen', True)
    names = card.get('heads', [])
    return Recommender(
        model, ids['items'], count_V, ids['titles'], card, id_type, filter_seen, names
    )


def _check(ids: Any, card: Any, item_VD: np.ndarray, count_V: np.ndarray) -> None:
    """Raises ValueError where the files of an export do not fit together."""
    for name in ('items', 'titles'):
        if not isinstance(ids[name], list) or not all(type(x) is str for x in ids[name]):
            raise ValueError(f'{name} are not texts')
    sizes = {len(ids['items']), len(ids['titles']), len(item_VD), len(count_V)}
    if len(sizes) > 1 or item_VD.ndim != 2 or count_V.ndim != 1 or ids['items'][0] != '':
        raise ValueError('its files have different numbers of items')
    if item_VD.dtype.kind not in 'fV' or count_V.dtype.kind not in 'iu':
        raise ValueError('its arrays are not numbers')
    if card['lengths'] != eval_batches.row_lengths(card['max_length']):
        raise ValueError('its row lengths are of another version')
    if not isinstance(card.get('filter_seen', True), bool):
        raise ValueError('filter_seen is not true or false')


def _check_facets(card: Any, facet_HDK: np.ndarray, item_VD: np.ndarray) -> None:
    """Raises ValueError where the heads do not fit together."""
    names, shape = card['heads'], (len(card['heads']), item_VD.shape[-1])
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise ValueError('the names of its heads are not texts')
    if len(set(names)) < len(names) or 'all' in names:
        raise ValueError('the names of its heads are not distinct')
    if facet_HDK.dtype.kind != 'f' or facet_HDK.ndim != 3 or facet_HDK.shape[:2] != shape:
        raise ValueError('facets.npy does not fit its items')


def _write_program(
    folder: Path,
    name: str,
    function: Callable[..., Any],
    leaves: list[Array],
    tree: Any,
    length: int,
) -> int:
    """Writes NAME_LENGTH.stablehlo; returns the second size of its first output."""
    from jax import export

    def flat(leaves: list[Array], *inputs: Array) -> Any:
        return function(jax.tree.unflatten(tree, leaves), *inputs)

    (batch,) = export.symbolic_shape('b')
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    inputs = [jax.ShapeDtypeStruct((batch, length), jnp.int32)] * 3
    program = export.export(jax.jit(flat), platforms=PLATFORMS)(like, *inputs)
    (folder / f'{name}_{length}.stablehlo').write_bytes(program.serialize())
    return int(program.out_avals[0].shape[1])


def _write_combine(folder: Path, model: ServedModel, queries: int) -> None:
    from jax import export

    batch, items = export.symbolic_shape('b, v')
    like = jax.ShapeDtypeStruct((batch, queries, items), jnp.float32)
    program = export.export(jax.jit(model.combine), platforms=PLATFORMS)(like)
    (folder / 'combine.stablehlo').write_bytes(program.serialize())


def _read_programs(folder: Path, name: str, lengths: Sequence[int]) -> Callable[..., Any]:
    """The programs of all row lengths as one function."""
    programs = {length: _read_program(folder / f'{name}_{length}.stablehlo') for length in lengths}

    def call(params: Any, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> Any:
        return programs[tokens_BL.shape[1]].call(params, tokens_BL, positions_BL, segments_BL)

    return call


def _read_program(path: Path) -> Any:
    from jax import export  # imported here, since it needs flatbuffers

    content = bytearray(path.read_bytes())
    with _parsing(path.name):
        return export.deserialize(content)


def _read_array(path: Path) -> np.ndarray:
    with _parsing(path.name):
        return np.load(path, allow_pickle=False)


@contextlib.contextmanager
def _parsing(name: str) -> Iterator[None]:
    """Turns every error of a parser into a ValueError: numpy's and flatbuffers' are of many types.

    Errors of the system keep their type.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f'{name} contains something else') from error


def _write_index(item_VD: np.ndarray, path: Path) -> bool:
    """Writes an exact FAISS index of inner products; returns False if faiss is not installed."""
    if importlib.util.find_spec('faiss') is None:
        return False
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(item_VD.shape[1]))
    indices = np.arange(1, len(item_VD), dtype=np.int64)
    index.add_with_ids(np.ascontiguousarray(item_VD[1:], np.float32), indices)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # faiss reports a full disk in this way
        raise UserError(f'writing {path}: {" ".join(str(error).split())}') from error
    return True


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS, the checksums of all other files in the form of sha256sum."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text(''.join(f'{_sha256(folder / name)}  {name}\n' for name in names))


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
