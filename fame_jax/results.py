"""The verdict on a run: every stage's figures, the protocol card they need, and the table."""

import functools
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import config as config_lib
from fame_jax import evaluate as judge
from fame_jax import records, train
from fame_jax.data import sequences
from fame_jax.errors import UserError
from fame_jax.models.build import initial
from fame_jax.run import TRAINED, Run, label, machine, ranker
from fame_jax.screen import table

Array = jax.Array
Tree = Any

SPLITS = ('validation', 'test')


def evaluate(run: Run) -> None:
    """Judges every trained stage of the run on validation and test, beside popularity."""
    results: dict[str, Any] = {'popularity': {'model': 'popularity'}}
    ranks = _popularity(run)
    about = {}
    for stage in TRAINED:
        if _has_checkpoint(run, stage):
            params, progress = _best(run, stage)
            began = time.monotonic()
            rank = ranker(run, run.module(stage))
            ranks |= {(stage, split): rank(params, split) for split in SPLITS}
            about[stage] = {
                'best_epoch': progress['best_epoch'],
                'epochs': progress['epoch'],
                'steps': progress['step'],
                'seconds': progress['seconds'],
                'machine': progress['machine'],
                'evaluation_seconds': time.monotonic() - began,
                'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
            }
            results[stage] = {'model': label(run.config, stage)}
            if stage == 'finetune' and run.data.item_facets is not None:
                results[stage]['facets'] = _facets(run, params)
    if not about:
        raise UserError(f'{run.folder} holds no trained model; run pretrain or finetune first')
    for (name, split), found in ranks.items():
        results[name][split] = {p: judge.metrics(getattr(found, p)) for p in judge.PROTOCOLS}
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


def _has_checkpoint(run: Run, stage: str) -> bool:
    if not (run.folder / 'checkpoints' / stage).is_dir():
        return False
    with run.checkpoints(stage) as checkpoints:
        return checkpoints.last_step() is not None


def _best(run: Run, stage: str) -> tuple[Tree, dict[str, Any]]:
    """The parameters of a stage's best epoch, without its optimizer, and its progress."""
    module = run.module(stage)
    like = jax.eval_shape(functools.partial(initial, module), jax.random.key(0))
    with run.checkpoints(stage) as checkpoints:
        progress = checkpoints.progress()
        params = checkpoints.restore(best=like)['best']
    if not progress['finished']:
        run.screen.say(f'evaluate: {stage} is not finished; its best epoch so far is judged')
    return params, progress


def _popularity(run: Run) -> dict[tuple[str, str], judge.Ranks]:
    """The floor's ranks, by ('popularity', split)."""
    items, _ = sequences.split_training(run.data)
    query_D, item_VD = judge.popularity(items, run.data.num_items)
    return {
        ('popularity', split): judge.rank_users(
            _everyone_alike, query_D, item_VD, run.held[split], run.data.num_users
        )
        for split in SPLITS
    }


def _everyone_alike(query_D: Array, tokens_BL: Array, *_: Array) -> Array:
    return jnp.broadcast_to(query_D[None], (tokens_BL.shape[0], query_D.shape[0]))


def _facets(run: Run, params: Tree) -> dict[str, Any]:
    """How far FAME's heads recover the facets that are known."""
    module = run.module('finetune')
    item_VD = module.apply({'params': params}, method='item_vectors')
    facet_HDK = params['facet_block']['facet']
    item_HVK = jnp.einsum('VD,HDK->HVK', item_VD[1:], facet_HDK)
    found = judge.match_heads(np.asarray(item_HVK, np.float32), run.data.item_facets[1:])
    whole = judge.neighbour_agreement(
        np.asarray(item_VD[1:], np.float32), run.data.item_facets[1:], 10
    )
    return found | {'whole_vector': whole.tolist()}


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
    facets = results.get('finetune', {}).get('facets')
    if facets and facets['unmatched'] is not None:
        lines.append(
            '\nHeads against planted facets: item neighbours agree '
            f'{facets["matched"]:.3f} where head and facet are matched, '
            f'{facets["unmatched"]:.3f} where not (0 is chance, 1 always).'
        )
    lines.append(
        f'\nEverything of this run is in {run.folder}; results.json holds the protocol card.'
    )
    return '\n'.join(lines)


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
