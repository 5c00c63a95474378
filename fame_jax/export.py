"""A trained run as one folder that serves without it, and without the code that trained it.

    card.json            protocol, figures, model, row lengths, versions
    encode_L.stablehlo   (params, tokens, positions, segments) -> queries; rows of length L
    look_L.stablehlo     the same, to FAME's gate, heads, router and attention; of FAME alone
    combine.stablehlo    scores of several queries -> one; of models that have several
    params.npz           the parameters, in order
    items.npy            float32 [V + 1, D], the item vectors
    items.faiss          the same as a FAISS index, where faiss is installed and one query is asked
    popularity.npy       int64 [V + 1], actions by item
    ids.json             outside ids of the items, and their titles where there are any
    SHA256SUMS           of all of these; `sha256sum -c SHA256SUMS` checks them

Programs are StableHLO for CPU and CUDA, whatever device wrote them. `serve.load_export` reads it.
"""

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fame_jax.data import pipeline
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.serve import FORMAT, SUMS, Model, Recommender

PLATFORMS = ('cpu', 'cuda')


def save(recommender: Recommender, folder: Path) -> None:
    """Writes the folder whole or not at all; an older export there is replaced.

    Raises:
      UserError: when it cannot be written, or holds something that is no export.
    """
    folder = Path(folder)
    with explain_os_errors(f'writing {folder}', 'choose another folder with --export'):
        if folder.exists() and any(folder.iterdir()) and not (folder / SUMS).is_file():
            raise UserError(f'{folder} holds something else; choose another folder with --export')
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as aside:
            # A folder of its own inside: the outer one is closed to others by its maker.
            fresh = Path(aside) / 'fresh'
            fresh.mkdir()
            _write(recommender, fresh)
            if folder.exists():
                folder.rename(Path(aside) / 'old')
            fresh.rename(folder)


def _write(recommender: Recommender, folder: Path) -> None:
    model = recommender.model
    leaves, tree = jax.tree.flatten(model.params)
    lengths = pipeline.row_lengths(model.max_length)
    write_program = _programs(leaves, tree, folder)
    for length in lengths:
        shape = write_program('encode', model.encode, length)
        if model.look is not None:
            write_program('look', model.look, length)
    queries = int(shape[1])
    if queries > 1:
        (folder / 'combine.stablehlo').write_bytes(_combine_program(model, queries))
    np.savez(folder / 'params.npz', **{str(i): np.asarray(x) for i, x in enumerate(leaves)})
    item_VD = np.asarray(model.item_VD)
    np.save(folder / 'items.npy', item_VD)
    np.save(folder / 'popularity.npy', recommender.count_V.astype(np.int64))
    indexed = queries == 1 and _write_index(item_VD, folder / 'items.faiss')
    ids = {'items': recommender.item_ids, 'titles': recommender.titles}
    (folder / 'ids.json').write_text(json.dumps(ids))
    card = recommender.card | {
        'format': FORMAT,
        'lengths': lengths,
        'max_length': model.max_length,
        'queries': queries,
        'facets': model.look is not None,
        'faiss': indexed,
        'platforms': list(PLATFORMS),
        'exported_with': f'jax {jax.__version__}',
    }
    (folder / 'card.json').write_text(json.dumps(card, indent=2, allow_nan=False) + '\n')
    _write_sums(folder)


def _programs(
    leaves: list[jax.Array], tree: Any, folder: Path
) -> Callable[[str, Callable[..., Any], int], tuple[int, ...]]:
    """What writes NAME_LENGTH.stablehlo and returns the shape of the program's first output."""
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]

    def write(name: str, function: Callable[..., Any], length: int) -> tuple[int, ...]:
        def flat(leaves: list[jax.Array], *rows: jax.Array) -> Any:
            return function(jax.tree.unflatten(tree, leaves), *rows)

        (batch,) = export.symbolic_shape('b')
        rows = [jax.ShapeDtypeStruct((batch, length), jnp.int32)] * 3
        program = export.export(jax.jit(flat), platforms=PLATFORMS)(like, *rows)
        (folder / f'{name}_{length}.stablehlo').write_bytes(program.serialize())
        return program.out_avals[0].shape

    return write


def _combine_program(model: Model, queries: int) -> bytes:
    batch, items = export.symbolic_shape('b, v')
    like = jax.ShapeDtypeStruct((batch, queries, items), jnp.float32)
    return export.export(jax.jit(model.combine), platforms=PLATFORMS)(like).serialize()


def _write_index(item_VD: np.ndarray, path: Path) -> bool:
    """An exact FAISS index of inner products under the items' numbers; False without faiss."""
    if importlib.util.find_spec('faiss') is None:
        return False
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(item_VD.shape[1]))
    numbers = np.arange(1, len(item_VD), dtype=np.int64)
    index.add_with_ids(np.ascontiguousarray(item_VD[1:], np.float32), numbers)
    faiss.write_index(index, str(path))
    return True


def _write_sums(folder: Path) -> None:
    """The checksum of every other file, as sha256sum writes them."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open('rb') as file:
            lines.append(f'{hashlib.file_digest(file, "sha256").hexdigest()}  {path.name}\n')
    (folder / SUMS).write_text(''.join(lines))
