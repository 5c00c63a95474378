"""FAME+ (arXiv 2601.12301): the stage that turns item texts into the table a model starts from."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fame_jax import contrast, encoder, item_table, probe, records
from fame_jax.config import Config
from fame_jax.data import download, item_text, synthetic
from fame_jax.data.facets import Facet, build_facet, merge
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models.projection import Projection
from fame_jax.run import Run, machine
from fame_jax.screen import duration

Tree = Any

INSTANCE = 'instance'  # the facet in which every item is its own label
TEXT_KEY = 1000  # folded into the seed's key; the trained stages have the small numbers


def text(run: Run) -> None:
    """Reads the items' texts and facets, encodes the texts, and fits a head to each facet."""
    folder, screen = run.folder / 'text', run.screen
    with records.locked(run.folder):
        if item_table.is_made(folder, run.data.card['fingerprint']):
            screen.say(f'text: {folder} is there')
            return
        run.metrics.keep(lambda line: line.get('stage') != 'text')
        began = time.monotonic()
        names = assign(run.config.facets or planted(run), run.config.num_heads)
        found = read_items(run, [name for name in dict.fromkeys(names) if name != INSTANCE])
        tell(run, found)
        text_VE = encode(run, found.texts)
        encoded = time.monotonic()
        module, before, after = fit_heads(run, names, found.facets, text_VE)
        seconds = {'encode': encoded - began, 'fit': time.monotonic() - encoded}
        probes = {
            stage: look(module, params, text_VE, found.facets, run.config.seed)
            for stage, params in (('before', before), ('after', after))
        }
        told = {
            'card': found.card,
            'data_sha256': run.data.card['fingerprint'],
            'heads': names,
            'items_with_text': int(text_VE.any(axis=1).sum()),
            'probes': probes,
            'seconds': seconds,
            'machine': machine(),
        }
        save(folder, module, after, text_VE, found.facets, told)
    screen.say(
        f'text: {len(names)} heads for {", ".join(names)}, {duration(seconds["fit"])} after '
        f'{duration(seconds["encode"])} of encoding, in {folder}'
    )


def assign(facets: Sequence[str], num_heads: int) -> list[str]:
    """A facet for each head: of too many the first are merged, for want of more instance is taken.

    Raises:
      UserError: when instance would have to be merged.
    """
    surplus = len(facets) - num_heads
    if surplus <= 0:
        return [*facets, *[INSTANCE] * -surplus]
    merged, rest = facets[: surplus + 1], facets[surplus + 1 :]
    if INSTANCE in merged:
        raise UserError(
            f'--facets={",".join(facets)} are more than --num_heads={num_heads}, and {INSTANCE} '
            'cannot be merged with another; name it last, or raise the heads'
        )
    return ['+'.join(merged), *rest]


def planted(run: Run) -> list[str]:
    """The names of the synthetic world's facets."""
    if run.data.item_facets is None:
        raise UserError(
            '--facets names no facet; name what the heads shall tell apart, such as '
            '--facets=leaf_category,brand or --facets=genres'
        )
    return [f'facet_{m + 1}' for m in range(run.data.item_facets.shape[1])]


def read_items(run: Run, facets: Sequence[str]) -> item_text.ItemText:
    """Texts and labels of the run's items, from the file that --items or the data set names."""
    config, data = run.config, run.data
    if config.dataset == 'synthetic' and not config.items:
        found = synthetic.describe_items(data.item_facets, config.synthetic_seed)
        known = {facet.name: facet for facet in found.facets}
        return found._replace(facets=tuple(_of_world(name, known) for name in facets))
    if config.text_encoder.endswith('.npy') and not facets and not config.items:
        card = {'source': config.text_encoder, 'facets': []}
        return item_text.ItemText(data.item_ids, data.item_ids, (), card)
    path = config.items or download.locate_items(config.dataset, config.data_dir)
    return item_text.read(
        path,
        data.item_ids,
        config.text_fields,
        facets,
        id_column=config.item_id_column,
        rarest=config.rarest_label,
        commonest=config.commonest_label,
    )


def _of_world(name: str, known: dict[str, Facet]) -> Facet:
    """A planted facet, or several as one."""
    unknown = [part for part in name.split('+') if part not in known]
    if unknown:
        raise UserError(
            f'--facets: the synthetic world has no {unknown[0]}; its facets are {", ".join(known)}'
        )
    if name in known:
        return known[name]
    parts = name.split('+')
    named = merge(parts, [known[part].by_item() for part in parts])
    return build_facet(name, named, rarest=1, commonest=1.0)


def tell(run: Run, found: item_text.ItemText) -> None:
    """One line for the items, one a facet."""
    items = run.data.num_items
    with_text = sum(map(bool, found.texts))
    run.screen.say(f'text: {with_text:,} of {items:,} items have a text ({found.card["source"]})')
    for facet in found.facets:
        card = facet.card
        run.screen.say(
            f'text: {facet.name}: {card["labels"]:,} labels, {card["items"]:,} items have one; '
            f'dropped {card["rare"]["labels"]:,} rare, {card["common"]["labels"]:,} common labels'
        )


def encode(run: Run, texts: Sequence[str]) -> np.ndarray:
    """The frozen text vectors, centred and each of length sqrt(E); zeros where there is no text."""
    config = run.config
    cache = Path(config.text_cache) if config.text_cache else download.list_folders()[-1] / 'text'
    text_VE = encoder.encode(
        texts,
        config.text_encoder,
        cache=cache,
        progress=run.screen.mode == 'bar',
        say=run.screen.say,
    )
    text_VE[0] = 0  # the padding, whatever a file says of it
    has_text_V1 = text_VE.any(axis=1, keepdims=True)
    mean_1E = text_VE.sum(axis=0, keepdims=True) / max(has_text_V1.sum(), 1)
    centred_VE = (text_VE - mean_1E) * has_text_V1
    length_V1 = np.linalg.norm(centred_VE, axis=1, keepdims=True)
    # What is left of a vector that is the mean itself is rounding.
    apart_V1 = length_V1 > 1e-5 * np.linalg.norm(text_VE, axis=1, keepdims=True)
    if apart_V1.sum() < 2:
        raise UserError(
            f'--text_encoder={config.text_encoder}: the vectors of all {has_text_V1.sum():,} items '
            'with a text are alike or zero; name other text fields or another encoder'
        )
    scaled_VE = centred_VE * apart_V1 / np.maximum(length_V1, 1e-12)
    return (scaled_VE * text_VE.shape[1] ** 0.5).astype(np.float32)


def fit_heads(
    run: Run, names: Sequence[str], facets: Sequence[Facet], text_VE: np.ndarray
) -> tuple[Projection, Tree, Tree]:
    """The projection, its parameters before and after the facet objective."""
    config = run.config
    module = Projection(config.num_heads, config.width, config.text_inner_width, config.text_design)
    key = jax.random.fold_in(jax.random.key(config.seed), TEXT_KEY)
    params = module.init(jax.random.fold_in(key, 0), text_VE[:1])['params']
    pools = make_pools(config, names, facets, text_VE.any(axis=1))
    options = contrast.Options(
        **{name: getattr(config, f'text_{name}') for name in contrast.Options._fields}
    )

    def report(epoch: int, loss_H: list[float]) -> None:
        run.metrics.append(
            stage='text',
            step=epoch,
            epoch=epoch,
            split='train',
            **{f'loss/{h}_{name}': loss for h, (name, loss) in enumerate(zip(names, loss_H))},
        )
        if epoch == options.epochs or epoch % 10 == 0:
            told = ', '.join(f'{name} {loss:.3f}' for name, loss in zip(names, loss_H))
            run.screen.say(f'text {epoch}/{options.epochs}: loss {told}')

    fitted = contrast.fit(
        module, params, text_VE, pools, jax.random.fold_in(key, 1), options, report
    )
    return module, params, fitted


def make_pools(
    config: Config, names: Sequence[str], facets: Sequence[Facet], has_text_V: np.ndarray
) -> list[contrast.Pool]:
    """What each head's facet draws from: items with a text.

    Raises:
      UserError: when a facet has no two of them to bring together.
    """
    label_VS = {facet.name: facet.label_VS for facet in facets}
    if config.shuffled_labels:
        label_VS = {name: shuffle(labels, config.seed) for name, labels in label_VS.items()}
    pools = []
    for name in names:
        if name == INSTANCE:
            pools.append(contrast.make_instances(has_text_V))
            continue
        pool = contrast.make_pool(np.where(has_text_V[:, None], label_VS[name], -1))
        if not np.any(pool.count_C > 1):
            raise UserError(f'facet {name!r}: no two items with a text share a label; name another')
        pools.append(pool)
    return pools


def shuffle(label_VS: np.ndarray, seed: int) -> np.ndarray:
    """The same label sets, dealt to other items; row 0 stays."""
    order = np.random.default_rng(seed).permutation(len(label_VS) - 1) + 1
    return np.concatenate([label_VS[:1], label_VS[order]])


def look(
    module: Projection,
    params: Tree,
    text_VE: np.ndarray,
    facets: Sequence[Facet],
    seed: int,
) -> dict[str, Any]:
    """What each head's item vectors tell of each facet; items without text are left out."""
    if not facets:  # of instances alone there is nothing to tell
        return {}
    has_text_V = text_VE.any(axis=1)
    item_VHK = np.asarray(module.apply({'params': params}, text_VE[has_text_V]))
    known = {facet.name: facet.label_VS[has_text_V] for facet in facets}
    return probe.compare(item_VHK.swapaxes(0, 1), known, seed)


def save(
    folder: Path,
    module: Projection,
    params: Tree,
    text_VE: np.ndarray,
    facets: Sequence[Facet],
    told: dict[str, Any],
) -> None:
    """Writes the stage's files, text.json last: with it the stage is finished."""
    items_VD = module.apply({'params': params}, text_VE, method='items')
    items_VD = np.where(text_VE.any(axis=1, keepdims=True), items_VD, 0)
    with explain_os_errors(f'making the folder {folder}'):
        folder.mkdir(exist_ok=True)
    with records.replacing(folder / 'items.npy') as file:
        np.save(file, items_VD.astype(np.float32))
    if module.design == 'shared':
        heads = [params[f'head_{h}']['kernel'] for h in range(module.num_heads)]
        with records.replacing(folder / 'facet.npy') as file:
            np.save(file, np.stack(heads))
    with records.replacing(folder / 'labels.npz') as file:
        arrays = {f'{facet.name}/items': facet.label_VS for facet in facets}
        names = {f'{facet.name}/names': np.array(facet.labels) for facet in facets}
        np.savez_compressed(file, **arrays, **names)
    records.write_json(folder / 'text.json', told)
