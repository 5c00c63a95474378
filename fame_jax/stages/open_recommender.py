"""A trained run as a Recommender."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fame_jax import run_dir
from fame_jax.data import download
from fame_jax.errors import UserError
from fame_jax.models.item_model import ItemModel
from fame_jax.parallel.mesh import item_sharding
from fame_jax.serving.recommender import DOT, SCALED_COSINE, Recommender, ServedModel
from fame_jax.stages import model_source
from fame_jax.stages.context import TRAINED, RunContext
from fame_jax.stages.facet_names import view_names
from fame_jax.text import items as item_text

Array = jax.Array
Tree = Any

# The functions, with their programs, of so many modules are kept: of two runs with two stages.
KEPT_MODULES = 4


def open_recommender(context: RunContext, mesh: Mesh | None = None) -> Recommender:
    """The best epoch of the last trained stage, with the run's catalogue.

    Args:
      context: a trained run.
      mesh: devices that share the item tables; None for one device.

    Raises:
      UserError: when nothing has been trained.
    """
    data = context.data
    stage = next((stage for stage in reversed(TRAINED) if context.is_trained(stage)), None)
    if stage is None:
        raise context.untrained()
    model_source.check_source(context)
    module = context.module(stage, mesh)
    if not context.is_finished(stage):
        context.screen.say(f'{stage} of {context.folder} is not finished; its best epoch is used')
    trained, _ = data.training_histories()
    with context.screen.waiting(f'reading the model of {context.folder}'):
        params = context.best_params(stage, module)
        model = serving_model(module, params, context.config.data.max_length)
    return Recommender(
        model,
        data.item_ids,
        np.bincount(trained, minlength=data.num_items + 1),
        read_titles(context),
        _card(context, stage),
        data.card.get('id_kinds', {}).get('item', 'str'),
        context.selects_masked,
        view_names(context, module),
    )


def serving_model(module: ItemModel, params: Tree, max_length: int) -> ServedModel:
    """A module and its parameters as functions of arrays, on the module's mesh."""
    facet_HDK = module.facet_projections(params)
    functions = _functions(module)
    return ServedModel(
        encode=functions.encode,
        combine=functions.combine,
        params=params,
        item_VD=functions.item_vectors(params),
        max_length=max_length,
        intermediates=functions.intermediates,
        mesh=module.mesh,
        score_kind=SCALED_COSINE if module.similarity == 'cosine' else DOT,
        facet_HDK=None if facet_HDK is None else facet_HDK.astype(jnp.float32),
    )


class _Functions(NamedTuple):
    """The functions of a `ServedModel`, and params -> item_VD."""

    encode: Callable[..., Array]
    combine: Callable[[Array], Array]
    item_vectors: Callable[[Tree], Array]
    intermediates: Callable[..., dict[str, Array]] | None


@functools.lru_cache(maxsize=KEPT_MODULES)
def _functions(module: ItemModel) -> _Functions:
    """The functions of a module; equal modules, such as those of several seeds, have the same ones.

    JAX keeps compiled programs by function object, so that other objects would be compiled anew.
    """

    def encode(params: Tree, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> Array:
        return module.apply({'params': params}, tokens_BL, positions_BL, segments_BL, last=True)[0]

    def intermediates(params: Tree, *rows: Array) -> dict[str, Array]:
        return module.apply({'params': params}, *rows, method='intermediates')

    item_vectors = jax.jit(
        lambda params: module.apply({'params': params}, method='item_vectors'),
        out_shardings=item_sharding(module.mesh),
    )
    has_parts = hasattr(module, 'intermediates')
    return _Functions(encode, module.combine, item_vectors, intermediates if has_parts else None)


def _card(context: RunContext, stage: str) -> dict[str, Any]:
    """Where a model comes from, and its test metrics if it was evaluated."""
    card = {
        'model': context.label(stage),
        'stage': stage,
        'best_epoch': context.progress(stage)['best_epoch'],
        'dataset': context.data.card,
        'seed': context.config.run.seed,
        'dtype': context.config.training.dtype,
    }
    results = context.folder / 'results.json'
    if results.is_file():
        protocol, results_of = run_dir.read_results(context.folder)
        names = ('split', 'candidates', 'masked', 'ties')
        card['protocol'] = {name: protocol.get(name) for name in names}
        card['test'] = results_of.get(stage, {}).get('test')
    return card


def read_titles(context: RunContext) -> list[str]:
    """The items' titles by index, of --items or of the data set's own file; [] if there are none.

    Raises:
      UserError: when the file of --items has no titles of the catalogue. The data set's own file
        was not named, so that the screen then says why it is not used.
    """
    config, data = context.config, context.data
    read = functools.partial(
        item_text.read_titles,
        item_ids=data.item_ids,
        **item_text.id_columns(config.data.column_names, data.card),
    )
    if config.text.items:
        return read(config.text.items)
    path = None
    if config.data.dataset != 'synthetic':
        with contextlib.suppress(UserError):
            path = download.locate_items(config.data.dataset, config.data.data_dir)
    if path is None:
        return []
    try:
        return read(path)
    except UserError as error:
        context.screen.say(f'no titles: {error}')
        return []
