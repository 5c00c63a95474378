"""The stage `text` of FAME+ (arXiv 2601.12301): item texts become a model's initial item table.

It reads texts and labels, encodes the texts, trains a head for each facet, and writes the item
vectors to text/ in the run's folder; see `fame_jax.text`. With --text_path it writes the frozen
text vectors too.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fame_jax import machine, run_dir
from fame_jax.data import download
from fame_jax.screen import duration
from fame_jax.stages.context import RunContext
from fame_jax.stages.facet_names import num_branches
from fame_jax.stages.text_settings import assign_facets, files_of
from fame_jax.text import facet_objective, facets, item_init, projection, synthetic_items, vectors
from fame_jax.text.items import ItemText, id_columns, read
from fame_jax.text.options import TextOptions


def text(context: RunContext) -> None:
    """Writes text/ in the run's folder; a folder that is complete is left as it is.

    Raises:
      UserError: when the texts, the facets or the options do not allow it; text/ is then not
        written.
    """
    config, screen, data = context.config, context.screen, context.data
    folder = context.folder / 'text'
    sha256 = data.card['fingerprint']
    context.begin_writing()
    has_heads, has_path = config.text.item_init == 'text', config.text.text_path > 0
    if item_init.is_complete(folder, sha256, files_of(config)):
        screen.say(f'text: {folder} is complete')
        return
    context.metrics.keep(lambda line: line.get('stage') != 'text')
    if not has_heads:
        _encode_alone(context, folder)
        return
    options = TextOptions.parse(config.text.text_options)
    heads, width = _heads(context), context.module('finetune').width
    options.check_heads(heads)

    began = time.monotonic()
    named = [name for name in dict.fromkeys(heads) if name != facets.INSTANCE]
    with screen.waiting('text: reading the items'):
        described = _read_items(context, named, options)
    _log_counts(context, described)
    with screen.waiting('text: encoding the texts', has_bar=True):
        text_VE = _encode(context, described.texts)

    encoded = time.monotonic()
    head_module, before, after = facet_objective.fit_heads(
        text_VE,
        heads,
        described.facets,
        width=width,
        options=options,
        seed=config.run.seed,
        report=lambda epoch, loss_H: _report(context, heads, options, epoch, loss_H),
    )
    seconds = {'encode': encoded - began, 'fit': time.monotonic() - encoded}
    branches, seed = num_branches(context.module('finetune')), config.run.seed
    probes = {
        name: projection.probe(head_module, params, text_VE, described.facets, seed, branches)
        for name, params in (('before', before), ('after', after))
    }
    record = {
        'card': described.card,
        'data_sha256': sha256,
        'heads': heads,
        'branches': branches,
        'items_with_text': int(text_VE.any(axis=1).sum()),
        'probes': probes,
        'seconds': seconds,
        'machine': machine.describe(),
    }
    if has_path:
        item_init.save_vectors(folder, text_VE)
    items_VD = projection.item_vectors(head_module, after, text_VE)
    item_init.save(folder, items_VD, described.facets, record)
    screen.say(
        f'text: {len(heads)} heads ({", ".join(heads)}) trained in {duration(seconds["fit"])}, '
        f'after {duration(seconds["encode"])} of encoding; written to {folder}'
    )


def encode_items(context: RunContext) -> np.ndarray:
    """The standardised text vectors of a run's items, float32 [V + 1, E]; zeros without a text.

    Raises:
      UserError: when the texts cannot be read or encoded.
    """
    options = TextOptions.parse(context.config.text.text_options)
    return _encode(context, _read_items(context, (), options).texts)


def _encode_alone(context: RunContext, folder: Path) -> None:
    """Writes the text vectors of --text_path, where the item table starts from something else."""
    screen, began = context.screen, time.monotonic()
    with screen.waiting('text: reading the items'):
        described = _read_items(context, [], TextOptions())
    _log_counts(context, described)
    with screen.waiting('text: encoding the texts', has_bar=True):
        text_VE = _encode(context, described.texts)
    item_init.save_vectors(folder, text_VE)
    record = {
        'card': described.card,
        'data_sha256': context.data.card['fingerprint'],
        'items_with_text': int(text_VE.any(axis=1).sum()),
        'seconds': {'encode': time.monotonic() - began},
        'machine': machine.describe(),
    }
    run_dir.write_json(folder / 'text.json', record)  # last: a folder that has it is complete
    screen.say(f'text: vectors of width {text_VE.shape[1]} written to {folder}')


def _heads(context: RunContext) -> list[str]:
    """The facet of each slice of the item vectors: --facets, or those of synthetic data."""
    names, facet_VM = list(context.config.text.facets), context.data.item_facets
    if not names and facet_VM is not None:
        names = [f'facet_{m + 1}' for m in range(facet_VM.shape[1])]
    return assign_facets(context.module('finetune'), names)


def _read_items(context: RunContext, names: Sequence[str], options: TextOptions) -> ItemText:
    """Texts and labels of the items, from --items or the data set's own file of items."""
    config, data = context.config, context.data
    if config.data.dataset == 'synthetic' and not config.text.items:
        described = synthetic_items.describe_items(
            data.item_facets, config.data.synthetic_options['seed']
        )
        return described._replace(facets=facets.select(names, described.facets))
    if config.text.text_encoder.endswith('.npy') and not names and not config.text.items:
        card = {'source': config.text.text_encoder, 'facets': []}
        return ItemText(data.item_ids, data.item_ids, (), card)
    path = config.text.items or download.locate_items(config.data.dataset, config.data.data_dir)
    return read(
        path,
        data.item_ids,
        config.text.text_fields,
        names,
        **id_columns(config.data.column_names, data.card),
        rarest=options.rarest_label,
        commonest=options.commonest_label,
    )


def _log_counts(context: RunContext, described: ItemText) -> None:
    """Says how many items have a text, and how many labels each facet keeps."""
    screen, num_items = context.screen, context.data.num_items
    with_text = sum(map(bool, described.texts))
    source = described.card['source']
    screen.say(f'text: {with_text:,} of {num_items:,} items have a text ({source})')
    for facet in described.facets:
        card = facet.card
        screen.say(
            f'text: {facet.name}: {card["labels"]:,} labels, {card["items"]:,} items have one; '
            f'dropped {card["rare"]["labels"]:,} rare and {card["common"]["labels"]:,} common '
            'labels'
        )


def _encode(context: RunContext, texts: Sequence[str]) -> np.ndarray:
    """The standardised text vectors, float32 [V + 1, E]."""
    config, screen = context.config, context.screen
    cache = Path(config.devices.cache_dir or download.list_folders()[-1]) / 'text'
    encoder = config.text.text_encoder
    text_VE = vectors.encode(
        texts, encoder, cache=cache, progress=screen.mode == 'bar', log=screen.say
    )
    return vectors.standardize(text_VE, encoder)


def _report(
    context: RunContext, heads: Sequence[str], options: TextOptions, epoch: int, loss_H: list[float]
) -> None:
    """Appends an epoch's losses to metrics.jsonl, and prints those of every tenth epoch."""
    context.metrics.append(
        stage='text',
        step=epoch,
        epoch=epoch,
        split='train',
        **{f'loss/{h}_{name}': loss for h, (name, loss) in enumerate(zip(heads, loss_H))},
    )
    if epoch == options.epochs or epoch % 10 == 0:
        losses = ', '.join(f'{name} {loss:.3f}' for name, loss in zip(heads, loss_H))
        context.screen.say(f'text {epoch}/{options.epochs}: loss {losses}')
