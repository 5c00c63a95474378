"""The stage evaluate: metrics of every trained stage, with a protocol card."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import machine, run_dir
from fame_jax.data.card import REPEATS_SAID
from fame_jax.data.dataset import Dataset
from fame_jax.evaluation import facet_probe, histories, lists, metrics, significance
from fame_jax.evaluation.ranking import Ranks, rank_users
from fame_jax.models.item_model import ItemModel
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.parallel import processes
from fame_jax.report import collect, figures
from fame_jax.screen import grid, table
from fame_jax.serving.recommender import ServedModel
from fame_jax.stages import model_source
from fame_jax.stages.context import SPLITS, TRAINED, RunContext
from fame_jax.stages.facet_names import head_names, num_branches
from fame_jax.stages.graph_baseline import SHUFFLED, GraphBaseline, graph_baseline
from fame_jax.stages.open_recommender import serving_model
from fame_jax.stages.top_lists import top_lists, use_of_heads
from fame_jax.text import item_init
from fame_jax.text.vectors import read_vectors
from fame_jax.training import loop

Array = jax.Array
Tree = Any

# Groups of targets by their training actions: name -> least and most.
TARGETS = {'unseen': (0, 0), 'rare': (1, 5), 'common': (6, 2**31)}


def evaluate(context: RunContext) -> None:
    """Ranks all users with every trained stage, with popularity and with the item graph.

    Writes results.json and ranks.npz and prints the test metrics.

    Raises:
      UserError: when no stage is trained.
    """
    _ = context.data  # refused here where there are none, before anything is written
    context.begin_writing()
    context.say_split()
    model_source.check_source(context)
    results: dict[str, Any] = {'popularity': {'model': 'popularity'}}
    with context.screen.waiting('evaluate: ranking by popularity'):
        ranks, stages = _rank_by_popularity(context), {}
        if context.config.serving.shuffle_histories != 'none':  # popularity does not read the order
            ranks['popularity', SHUFFLED] = ranks['popularity', 'test']
        results['popularity']['lists'] = _list_metrics(context, _popularity_model(context))
    for stage in filter(context.is_trained, TRAINED):
        with context.screen.waiting(f'evaluate: ranking by {stage}'):
            params, stages[stage], of_stage, of_lists = _evaluate_stage(context, stage)
        ranks |= of_stage
        results[stage] = {'model': context.label(stage), 'lists': of_lists}
        facet_HDK = context.module(stage).facet_projections(params)
        # Branches have views of the items too, and no heads unless they are FAMEs.
        has_heads = facet_HDK is not None and hasattr(context.module(stage), 'intermediates')
        if has_heads and jax.process_count() == 1:
            with context.screen.waiting('evaluate: comparing the heads'):
                results[stage]['heads'] = use_of_heads(context, params)
        facets = _probe_facets(context, params, facet_HDK) if has_heads else {}
        names = head_names(context, context.module(stage))
        facets |= {'heads': names} if facets and names else {}
        results[stage] |= {'facets': facets} if facets else {}
    if not stages:
        raise context.untrained()
    # Read from a checkpoint, which all processes open together.
    protocol = 'masked' if context.selects_masked else 'unmasked'
    if not processes.is_chief():
        return
    # After all that the processes do together, since the others would wait for the chief.
    graph = graph_baseline(context)
    if graph is not None:
        of_graph, row = _graph_results(context, graph, protocol)
        ranks |= of_graph
        popularity = results.pop('popularity')
        results = {'popularity': popularity, 'item_graph': row} | results
    actions = {split: _target_actions(context, split) for split in SPLITS}
    for (name, split), found in ranks.items():
        results[name][split] = _metrics(found)
        if split in SPLITS:
            results[name].setdefault('by_target', {})[split] = by_target(found, actions[split])
    with run_dir.atomic_write(context.folder / 'ranks.npz') as file:
        np.savez_compressed(
            file,
            **{
                f'{name}/{split}/{protocol}': getattr(found, protocol)
                for (name, split), found in ranks.items()
                for protocol in metrics.PROTOCOLS
            },
        )
    card = protocol_card(context, stages)
    run_dir.write_json(context.folder / 'results.json', {'card': card, 'results': results})
    if context.prints:
        print(summary(context, card, results, _order_lines(ranks, results, card['select_on'])))
    if 'facets' in results.get('finetune', {}):  # after the results, which do not need figures
        _draw(context, params, results['finetune']['facets'])


def _evaluate_stage(
    context: RunContext, stage: str
) -> tuple[Tree, dict[str, Any], dict[tuple[str, str], Ranks], dict[str, Any]]:
    """A stage's best parameters, part of the protocol card, ranks by split, and `lists`."""
    progress = context.progress(stage)
    if not context.is_finished(stage):
        context.screen.say(f'evaluate: {stage} is not finished; its best epoch so far is used')
    module = context.module(stage, context.mesh)
    params = context.best_params(stage, module)
    began, ranker = time.monotonic(), context.ranker(stage)
    ranks = {(stage, split): ranker(params, split) for split in SPLITS}
    seconds = time.monotonic() - began
    model = serving_model(module, params, context.config.data.max_length)
    if context.config.serving.shuffle_histories != 'none':
        ranks[stage, SHUFFLED] = _rank_after_shuffling(context, model)
    of_lists = _list_metrics(context, model)
    params = _gather(context, params)
    card = {
        'select_on': _selected_by(progress),
        'best_epoch': progress['best_epoch'],
        'epochs': progress['epoch'],
        'steps': progress['step'],
        'seconds': progress['seconds'],
        'machine': progress['machine'],
        'evaluation_seconds': seconds,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    return params, card, ranks, of_lists


def _selected_by(progress: dict[str, Any]) -> str:
    """The protocol by which a stage's best epoch was selected; masked before version 0.3."""
    name = progress.get('select_on', loop.SELECT_ON)
    return next(p for p in metrics.PROTOCOLS if name == metrics.log_name(loop.SELECT_ON, p))


def _list_metrics(context: RunContext, model: ServedModel) -> dict[str, dict[str, float]]:
    """Protocol -> metrics of the lists of the test users, masked or not as epochs are selected."""
    data, masked = context.data, context.selects_masked
    item_UK = top_lists(context, model, masked=masked)
    found = lists.list_metrics(item_UK, *data.training_histories(), data.num_items)
    return {'masked' if masked else 'unmasked': found}


def _rank_after_shuffling(context: RunContext, model: ServedModel) -> Ranks:
    """The ranks of the test targets after histories in random order, but for their last item."""
    return rank_users(
        model.encode,
        model.params,
        model.item_VD,
        map(histories.shuffle_all_but_last, context.eval_batches['test']),
        context.num_targets('test'),
        model.combine,
        num_items=context.data.num_items,
        mesh=model.mesh,
    )


def _gather(context: RunContext, params: Tree) -> Tree:
    """The parameters as one device has them, without a sharded table's padding rows."""
    if context.mesh is None:
        return params

    def gather(path: tuple, leaf: Array) -> np.ndarray:
        array = mesh_lib.gather(leaf)
        return array[: context.data.num_items + 1] if path[0].key in mesh_lib.TABLES else array

    return jax.tree_util.tree_map_with_path(gather, params)


def _metrics(ranks: Ranks) -> dict[str, dict[str, float]]:
    return {p: metrics.metrics(getattr(ranks, p)) for p in metrics.PROTOCOLS}


def _target_actions(context: RunContext, split: str) -> np.ndarray:
    """How often each target occurs in the training parts of all histories, [R]."""
    data = context.data
    items, _ = data.training_histories()
    _, ends = data.history_bounds(split)
    return np.bincount(items, minlength=data.num_items + 1)[data.items[ends]]


def by_target(ranks: Ranks, actions_U: np.ndarray) -> dict[str, Any]:
    """Metrics of the users whose target has no, few, and more training actions (TARGETS)."""
    groups = {}
    for name, (least, most) in TARGETS.items():
        chosen_U = (actions_U >= least) & (actions_U <= most)
        groups[name] = {'users': int(chosen_U.sum())}
        if chosen_U.any():
            groups[name] |= _metrics(Ranks(ranks.masked[chosen_U], ranks.unmasked[chosen_U]))
    return groups


def _rank_by_popularity(context: RunContext) -> dict[tuple[str, str], Ranks]:
    """The ranks of the popularity baseline, by ('popularity', split)."""
    model = _popularity_model(context)
    return {
        ('popularity', split): rank_users(
            model.encode,
            model.params,
            model.item_VD,
            context.eval_batches[split],
            context.num_targets(split),
            model.combine,
        )
        for split in SPLITS
    }


def _popularity_model(context: RunContext) -> ServedModel:
    """The popularity baseline as a model."""
    data = context.data
    query_D, item_VD = metrics.popularity(data.training_histories()[0], data.num_items)
    return ServedModel(
        _same_query, ItemModel.combine, query_D, item_VD, context.config.data.max_length
    )


def _graph_results(
    context: RunContext, graph: GraphBaseline, protocol: str
) -> tuple[dict[tuple[str, str], Ranks], dict[str, Any]]:
    """The ranks of the item graph by ('item_graph', split), and its row of the results.

    Args:
      context: of the run.
      graph: the baseline of its data.
      protocol: of the lists.
    """
    ranks = {('item_graph', split): found for split, found in graph.ranks.items()}
    if context.config.serving.shuffle_histories == 'none':
        del ranks['item_graph', SHUFFLED]
    row = {'model': 'item graph', 'lists': {protocol: graph.lists[protocol]}}
    return ranks, row | {'setting': graph.setting, 'chosen_by': graph.chosen_by}


def _same_query(query_D: Array, tokens_BL: Array, *_: Array) -> Array:
    return jnp.broadcast_to(query_D[None, None], (tokens_BL.shape[0], 1, query_D.shape[0]))


def _labels(context: RunContext) -> dict[str, np.ndarray]:
    """label_VS by facet, of the stage text, or else the synthetic data's planted facets."""
    stored = item_init.read_labels(context.folder / 'text', context.data.num_items)
    facet_VM = context.data.item_facets
    if stored or facet_VM is None:
        return {facet: label_VS for facet, (label_VS, _) in stored.items()}
    return {f'facet_{m + 1}': label_V[:, None] for m, label_V in enumerate(facet_VM.T)}


def _probe_facets(context: RunContext, params: Tree, facet_HDK: Array) -> dict[str, Any]:
    """How well each head's item vectors agree with each known facet; {} if none is known."""
    labels = _labels(context)
    if not labels:
        return {}
    item_VD, known_V = _probed_vectors(context, params)
    item_HVK = jnp.einsum('VD,HDK->HVK', item_VD, facet_HDK)
    known = {name: label_VS[known_V] for name, label_VS in labels.items()}
    seed, branches = context.config.run.seed, num_branches(context.module('finetune'))
    return facet_probe.compare(np.asarray(item_HVK, np.float32), known, seed, branches)


def _probed_vectors(context: RunContext, params: Tree) -> tuple[np.ndarray, np.ndarray]:
    """FAME's vectors of the items that have a text, and which items these are, bool [V + 1].

    Without a stage text, of all items.
    """
    path = context.folder / 'text' / 'items.npy'
    known_V = np.arange(context.data.num_items + 1) > 0
    if path.is_file():
        known_V = read_vectors(path, context.data.num_items + 1).any(axis=1)
    item_VD = context.module('finetune').apply({'params': params}, method='item_vectors')
    return np.asarray(item_VD, np.float32)[known_V], known_V


def _draw(context: RunContext, params: Tree, facets: dict[str, Any]) -> None:
    """The figures of FAME+: heads against facets by stage, and a map of the items."""
    folder = context.folder / 'text'
    labels = item_init.read_labels(folder, context.data.num_items)
    if not labels:
        return
    probes = run_dir.read_json(folder / 'text.json')['probes']
    stages = {'text, before': probes['before'], 'text, after': probes['after']}
    figures.heads_by_facets(stages | {'fine-tuned': facets}, context.folder / 'heads.svg')
    item_VD, known_V = _probed_vectors(context, params)
    item_B, xy = facet_probe.tsne_map(item_VD, context.config.run.seed)
    names = {
        facet: [
            [str(name_C[label]) for label in label_S if label >= 0]
            for label_S in label_VS[known_V][item_B]
        ]
        for facet, (label_VS, name_C) in labels.items()
    }
    figures.item_map(xy, names, context.folder / 'items.svg')


def summary(
    context: RunContext, card: dict[str, Any], results: dict[str, Any], order_lines: Sequence[str]
) -> str:
    """The text of the terminal: test metrics in both protocols, lists, and rare targets."""
    columns = [f'{name}@{k}' for name in ('hr', 'ndcg') for k in metrics.CUTOFFS]
    rows = {result['model']: result['test'] for result in results.values()}
    if order_lines:
        columns.append('shuffled ndcg@10')
        for result in results.values():
            rows[result['model']] = {
                protocol: of_test | {columns[-1]: result[SHUFFLED][protocol]['ndcg@10']}
                for protocol, of_test in result['test'].items()
            }
    lines = [
        f'\n{title(context.data)}\n',
        table(rows, columns),
        _lists_table(results),
        _rare_targets(results, 'targets' if context.data.split.is_by_time else 'users'),
    ]
    share = context.repeats['test']
    if share > REPEATS_SAID:
        lines.append(
            f'\n{share:.0%} of the test targets stand in the history of their user; the masked '
            'ranking has each of them last, the unmasked does not.'
        )
    for block in (order_lines, collect.limit_lines(card)):
        lines += ['\n' + '\n'.join(block)] if block else []
    heads = results.get('finetune', {}).get('heads')
    if heads:
        lines.append('\n' + _heads_line(heads))
    facets = results.get('finetune', {}).get('facets')
    if facets and facets['unmatched'] is not None:
        lines.append(
            '\nHeads against facets: neighbouring items agree '
            f'{facets["matched"]:.3f} in the facet matched to the head, '
            f'{facets["unmatched"]:.3f} in the others (0 is chance, 1 always).'
        )
    lines.append(f'\nThe run is in {context.folder}; results.json holds the protocol card.')
    return '\n'.join(lines)


def title(data: Dataset) -> str:
    """The line over a table of test metrics: data set, split, targets and catalogue."""
    card, split = data.card, data.split
    users = f'all {data.num_users:,} users'
    if split.is_by_time:
        users = f'{split.describe_targets("test")} from {split.card["moment"]}'
    return f'{card["name"]}, test: {users}, each against all {data.num_items:,} items'


def _heads_line(heads: dict[str, Any]) -> str:
    """How FAME uses its heads and experts, in words; see `head_use`."""
    found = {
        'items that the lists of two heads share': heads['overlap@10'],
        'entropy of the gate': heads['gate_entropy'],
        'entropy of the router': heads['router_entropy'],
        'balance of the experts': heads['balance'],
    }
    parts = [f'{name} {value:.2f}' for name, value in found.items() if value is not None]
    return f'Heads, each from 0 to 1: {", ".join(parts)}.' if parts else 'One head, one expert.'


def _lists_table(results: dict[str, Any]) -> str:
    (protocol,) = results['popularity']['lists']
    rows = [
        [result['model'], *(lists.show(name, value) for name, value in found.items())]
        for result in results.values()
        for found in result['lists'].values()
    ]
    return '\n' + grid([f'lists, {protocol}', *lists.COLUMNS], rows, right=range(1, 6))


def _order_lines(
    ranks: dict[tuple[str, str], Ranks], results: dict[str, Any], protocol: str
) -> list[str]:
    """A line for each trained stage: NDCG@10 without and with the order; [] without a test."""
    names = [name for name, split in ranks if split == SHUFFLED and name != 'popularity']
    gain_U = {key: significance.ndcg(getattr(found, protocol), 10) for key, found in ranks.items()}
    tests = [significance.paired_interval(gain_U[n, SHUFFLED], gain_U[n, 'test']) for n in names]
    return [
        f'{results[name]["model"]} with the items before the last in random order: {protocol} '
        f'NDCG@10 {test.first:.4f} instead of {test.second:.4f} ({test}).'
        for name, test in zip(names, tests)
    ]


def _rare_targets(results: dict[str, Any], what: str = 'users') -> str:
    """HR@10 of targets with no and with few training actions, where there are such users.

    In the ranking that selects epochs, as the lists.
    """
    (protocol,), lines = results['popularity']['lists'], []
    for name, times in (('unseen', 'never'), ('rare', '1 to 5 times')):
        of_model = {r['model']: r['by_target']['test'][name] for r in results.values()}
        users = next(iter(of_model.values()))['users']
        if users:
            values = ', '.join(
                f'{model} {group[protocol]["hr@10"]:.4f}' for model, group in of_model.items()
            )
            lines.append(
                f'\nTargets seen {times} in training ({users:,} {what}), {protocol} HR@10: '
                f'{values}.'
            )
    return ''.join(lines)


def protocol_card(context: RunContext, stages: dict[str, Any]) -> dict[str, Any]:
    """The protocol, settings and machine that the metrics belong to."""
    *_, last = stages.values()
    by_time = context.data.split.card
    return {
        'dataset': context.data.card,
        'split': context.data.split.describe(),
        **({'time_split': by_time} if by_time else {}),
        'candidates': 'all items of the catalogue',
        'masked': 'items of the whole history before the target score -inf',
        'unmasked': 'nothing is masked but the padding',
        'ties': 'count against the target',
        'repeats': context.repeats,
        'selection': f'best epoch by validation {loop.SELECT_ON}, {last["select_on"]}, '
        f'{context.describe_selection()}',
        'select_on': last['select_on'],
        'lists': f'the best {lists.K} items of each test user; popularity of training actions',
        'shuffle_histories': context.config.serving.shuffle_histories,
        'seed': context.config.run.seed,
        'config': context.config.flat(),
        'stages': stages,
        'evaluated_on': machine.describe() | {'peak_memory_bytes': machine.peak_memory()},
    }
