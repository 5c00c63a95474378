"""The verdict on a run: every stage's figures, the protocol card they need, and the table."""

import resource
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import config as config_lib
from fame_jax import evaluate as judge
from fame_jax import item_table, plots, probe, records, sharding, train
from fame_jax.data import sequences
from fame_jax.encoder import read_vectors
from fame_jax.errors import UserError
from fame_jax.models.items import ItemModel
from fame_jax.run import TRAINED, Run, abstract, label, machine
from fame_jax.screen import table

Array = jax.Array
Tree = Any

SPLITS = ('validation', 'test')
# How often training has seen a target, from and to.
TARGETS = {'unseen': (0, 0), 'rare': (1, 5), 'common': (6, 2**31)}


def evaluate(run: Run) -> None:
    """Judges every trained stage of the run on validation and test, beside popularity."""
    results: dict[str, Any] = {'popularity': {'model': 'popularity'}}
    ranks = _popularity(run)
    about = {}
    for stage in TRAINED:
        if run.is_trained(stage):
            module = run.module(stage, run.mesh)
            params, progress = run.best(stage, module)
            if not progress['finished']:
                run.screen.say(
                    f'evaluate: {stage} is not finished; its best epoch so far is judged'
                )
            began = time.monotonic()
            rank = run.ranker(stage)
            ranks |= {(stage, split): rank(params, split) for split in SPLITS}
            about[stage] = {
                'best_epoch': progress['best_epoch'],
                'epochs': progress['epoch'],
                'steps': progress['step'],
                'seconds': progress['seconds'],
                'machine': progress['machine'],
                'evaluation_seconds': time.monotonic() - began,
                'parameters': sum(
                    leaf.size for leaf in jax.tree.leaves(abstract(run.module(stage)))
                ),
            }
            results[stage] = {'model': label(run.config, stage)}
            params = _together(run, params) if stage == 'finetune' else params
            facets = _facets(run, params) if stage == 'finetune' else {}
            results[stage] |= {'facets': facets} if facets else {}
    if not about:
        raise UserError(f'{run.folder} holds no trained model; run pretrain or finetune first')
    times_seen = {split: _times_seen(run, split) for split in SPLITS}
    for (name, split), found in ranks.items():
        results[name][split] = {p: judge.metrics(getattr(found, p)) for p in judge.PROTOCOLS}
        results[name].setdefault('by_target', {})[split] = by_target(found, times_seen[split])
    if not sharding.is_chief():
        return
    with records.replacing(run.folder / 'ranks.npz') as file:
        np.savez_compressed(
            file,
            **{
                f'{name}/{split}/{protocol}': getattr(found, protocol)
                for (name, split), found in ranks.items()
                for protocol in judge.PROTOCOLS
            },
        )
    card = protocol_card(run, about)
    records.write_json(run.folder / 'results.json', {'card': card, 'results': results})
    print(summary(run, results))
    if 'facets' in results.get('finetune', {}):  # last, for what is judged shall not wait for it
        _draw(run, params, facets)


def _together(run: Run, params: Tree) -> Tree:
    """The parameters as one device has them, from wherever their parts are."""
    if run.mesh is None:
        return params

    def one(path: tuple, leaf: Array) -> np.ndarray:
        array = sharding.whole(leaf)
        return array[: run.data.num_items + 1] if path[0].key in sharding.TABLES else array

    return jax.tree_util.tree_map_with_path(one, params)


def _times_seen(run: Run, split: Literal['validation', 'test']) -> np.ndarray:
    """How often each user's target occurs in the training part of all histories, [U]."""
    items, _ = sequences.split_training(run.data)
    _, _, target_U = sequences.held_out(run.data, split)
    return np.bincount(items, minlength=run.data.num_items + 1)[target_U]


def by_target(ranks: judge.Ranks, times_seen_U: np.ndarray) -> dict[str, Any]:
    """The metrics of users whose target training never saw, rarely saw, and saw more often."""
    found = {}
    for name, (low, high) in TARGETS.items():
        chosen_U = (times_seen_U >= low) & (times_seen_U <= high)
        found[name] = {'users': int(chosen_U.sum())}
        if chosen_U.any():
            found[name] |= {p: judge.metrics(getattr(ranks, p)[chosen_U]) for p in judge.PROTOCOLS}
    return found


def _popularity(run: Run) -> dict[tuple[str, str], judge.Ranks]:
    """The floor's ranks, by ('popularity', split)."""
    items, _ = sequences.split_training(run.data)
    query_D, item_VD = judge.popularity(items, run.data.num_items)
    return {
        ('popularity', split): judge.rank_users(
            *(_everyone_alike, query_D, item_VD, run.held[split], run.data.num_users),
            ItemModel.combine,
        )
        for split in SPLITS
    }


def _everyone_alike(query_D: Array, tokens_BL: Array, *_: Array) -> Array:
    return jnp.broadcast_to(query_D[None, None], (tokens_BL.shape[0], 1, query_D.shape[0]))


def _known_labels(run: Run) -> dict[str, np.ndarray]:
    """label_VS by facet: those the stage text found, or else the synthetic world's."""
    stored = item_table.read_labels(run.folder / 'text', run.data.num_items)
    if stored or run.data.item_facets is None:
        return {facet: label_VS for facet, (label_VS, _) in stored.items()}
    return {f'facet_{m + 1}': label_V[:, None] for m, label_V in enumerate(run.data.item_facets.T)}


def _facets(run: Run, params: Tree) -> dict[str, Any]:
    """What FAME's heads tell of the facets that are known; of items with a text, if there are any.

    Empty where no facet is known.
    """
    labels = _known_labels(run)
    if not labels:
        return {}
    item_VD, told_V = _told_vectors(run, params)
    item_HVK = jnp.einsum('VD,HDK->HVK', item_VD, params['facet_block']['facet'])
    known = {name: label_VS[told_V] for name, label_VS in labels.items()}
    return probe.compare(np.asarray(item_HVK, np.float32), known, run.config.seed)


def _told_vectors(run: Run, params: Tree) -> tuple[np.ndarray, np.ndarray]:
    """FAME's vectors of the items that the stage text knew something of, and which those are.

    Where there was no such stage, of all items; the second is bool [V + 1].
    """
    path = run.folder / 'text' / 'items.npy'
    told_V = np.arange(run.data.num_items + 1) > 0
    if path.is_file():
        told_V = read_vectors(path, run.data.num_items + 1).any(axis=1)
    item_VD = run.module('finetune').apply({'params': params}, method='item_vectors')
    return np.asarray(item_VD, np.float32)[told_V], told_V


def _draw(run: Run, params: Tree, found: dict[str, Any]) -> None:
    """The pictures of FAME+: heads by facets from stage to stage, and a map of the items."""
    folder = run.folder / 'text'
    labels = item_table.read_labels(folder, run.data.num_items)
    if not labels:
        return
    probes = records.read_json(folder / 'text.json')['probes']
    stages = {'text, before': probes['before'], 'text, after': probes['after']}
    plots.heads_by_facets(stages | {'fine-tuned': found}, run.folder / 'heads.svg')
    item_VD, told_V = _told_vectors(run, params)
    item_B, xy = probe.flatten(item_VD, run.config.seed)
    names = {
        facet: _name_labels(label_VS[told_V][item_B], names_C)
        for facet, (label_VS, names_C) in labels.items()
    }
    plots.item_map(xy, names, run.folder / 'items.svg')


def _name_labels(label_BS: np.ndarray, names_C: np.ndarray) -> list[list[str]]:
    """Each item's labels by name."""
    return [[str(names_C[label]) for label in label_S if label >= 0] for label_S in label_BS]


def summary(run: Run, results: dict[str, Any]) -> str:
    """What the screen shows of the results: the test split, both protocols."""
    card = run.data.card
    lines = [
        f'\n{card["name"]}, test: all {card["users"]:,} users, each against all '
        f'{card["items"]:,} items\n',
        table(
            {result['model']: result['test'] for result in results.values()},
            [f'{metric}@{k}' for metric in ('hr', 'ndcg') for k in judge.CUTOFFS],
        ),
    ]
    lines += [_tell_rare(results)]
    facets = results.get('finetune', {}).get('facets')
    if facets and facets['unmatched'] is not None:
        lines.append(
            '\nHeads against facets: item neighbours agree '
            f'{facets["matched"]:.3f} where head and facet are matched, '
            f'{facets["unmatched"]:.3f} where not (0 is chance, 1 always).'
        )
    lines.append(
        f'\nEverything of this run is in {run.folder}; results.json holds the protocol card.'
    )
    return '\n'.join(lines)


def _tell_rare(results: dict[str, Any]) -> str:
    """HR@10 for targets that training never or rarely saw, where there are such users."""
    lines = []
    for name, meaning in (('unseen', 'never'), ('rare', '1 to 5 times')):
        of = {r['model']: r['by_target']['test'][name] for r in results.values()}
        users = next(iter(of.values()))['users']
        if users:
            told = ', '.join(
                f'{model} {found["masked"]["hr@10"]:.4f}' for model, found in of.items()
            )
            lines.append(f'\nTargets seen {meaning} in training ({users:,} users), HR@10: {told}.')
    return ''.join(lines)


def protocol_card(run: Run, stages: dict[str, Any]) -> dict[str, Any]:
    """What a figure must carry to mean something."""
    config, card = run.config, run.data.card
    return {
        'dataset': card,
        'split': 'leave one out: last item test, the one before validation, the rest training',
        'candidates': 'all items of the catalogue',
        'masked': 'items of the whole history before the target score -inf',
        'unmasked': 'nothing is masked but the padding',
        'ties': 'count against the target',
        'selection': f'best epoch by validation {train.SELECT_ON}, masked, all users',
        'seed': config.seed,
        'config': {n: getattr(config, n) for n in config_lib.fields()},
        'stages': stages,
        'judged_on': machine() | {'peak_memory_bytes': peak_memory()},
    }


def peak_memory() -> int:
    """The most memory this process held so far, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
