"""The item graph as a baseline of the stage evaluate, computed once for a prepared data set.

item_graph.npz, next to the folder of the prepared data, keeps the ranks and the setting, so that
all runs on the data share them. They are computed again where the data or the method differ.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import run_dir
from fame_jax.data.card import REPEATS_RULE
from fame_jax.data.split import list_places
from fame_jax.errors import UserError
from fame_jax.evaluation import histories, item_graph, lists, metrics
from fame_jax.evaluation.ranking import Ranks
from fame_jax.report.collect import DAMAGED
from fame_jax.screen import duration
from fame_jax.stages.context import SPLITS, RunContext

FILE = 'item_graph.npz'  # of a split by time, the fingerprint is part of the name
VERSION = 1  # of the figures; ranks of another version are computed again
SHUFFLED = 'shuffled'  # in the place of a split: the test targets, after histories in random order


@dataclasses.dataclass(frozen=True)
class GraphBaseline:
    """The item graph's ranks of all targets.

    Attributes:
      ranks: of each target, by split, and after histories in random order as `SHUFFLED`.
      lists: protocol -> metrics of the lists of the test users.
      setting: the values that were chosen, by name.
      chosen_by: the metric and the users that chose them, in words.
    """

    ranks: dict[str, Ranks]
    lists: dict[str, dict[str, float]]
    setting: dict[str, float]
    chosen_by: str


def graph_baseline(context: RunContext) -> GraphBaseline | None:
    """The kept baseline of the run's data, or a new one, which is then kept.

    Returns:
      None where the data are too large for it; see `item_graph.choose`.

    Raises:
      UserError: when it can be kept in no folder.
    """
    folders = dict.fromkeys([context.dataset_folder.parent, context.folder])
    name = FILE
    if context.data.split.is_by_time:
        # Runs with other splits of the same data have a file of their own.
        name = f'item_graph_{context.data.card["fingerprint"][:12]}.npz'
    for folder in folders:
        kept = _read(folder / name, context)
        if kept is not None:
            return kept
    began = time.monotonic()
    found = _compute(context)
    if found is None:
        context.screen.say(
            'evaluate: the item graph is left out, since it needs more than '
            f'{item_graph.MAX_PAIRS:,} pairs of items or {item_graph.MAX_PRODUCTS:,} '
            'multiplications for these data'
        )
        return None
    path = _keep(found, context, [folder / name for folder in folders])
    seconds = duration(time.monotonic() - began)
    context.screen.say(f'evaluate: the item graph took {seconds} and is kept in {path}')
    return found


def _compute(context: RunContext) -> GraphBaseline | None:
    data, screen = context.data, context.screen
    training = item_graph.Training(*data.training_histories(), data.num_items)
    split = {name: _histories(context, name) for name in SPLITS}
    users = _sample(context)
    is_rule = context.repeats['validation'] > REPEATS_RULE
    protocol = 'unmasked' if is_rule else 'masked'
    what = 'targets' if data.split.is_by_time else 'users'
    chosen_by = f'{item_graph.SELECT_ON} of {len(users):,} validation {what}, {protocol}'
    with screen.waiting(f'evaluate: choosing the item graph by {chosen_by}'):
        chosen = item_graph.choose(training, split['validation'], users, protocol)
    if chosen is None:
        return None
    test = split['test']
    split[SHUFFLED] = _shuffle(test)
    arguments = chosen.path_VV, chosen.setting, training.count_V
    with screen.waiting('evaluate: ranking by the item graph'):
        ranks = {name: item_graph.rank_users(of, *arguments) for name, of in split.items()}
    with screen.waiting('evaluate: lists of the item graph'):
        item_UK = item_graph.list_users(test, *arguments, lists.K)
    of_lists = {
        protocol: lists.list_metrics(of_protocol_UK, *training)
        for protocol, of_protocol_UK in item_UK.items()
    }
    return GraphBaseline(ranks, of_lists, chosen.setting._asdict(), chosen_by)


def _histories(context: RunContext, split: str) -> item_graph.Histories:
    """All histories and targets of a split."""
    items = context.data.items
    starts, ends = context.data.history_bounds(split)
    return item_graph.Histories(items, starts, ends, items[ends])


def _shuffle(test: item_graph.Histories) -> item_graph.Histories:
    """The histories in random order but for their last item."""
    if (test.starts[1:] < test.ends[:-1]).any():
        # Of several targets of a user: each history is a copy of its own.
        copied = test.items[list_places(test.starts, test.ends)]
        ends = np.cumsum(test.ends - test.starts)
        test = test._replace(items=copied, starts=ends - (test.ends - test.starts), ends=ends)
    return test._replace(items=histories.shuffle_items(test.items, test.starts, test.ends))


def _sample(context: RunContext) -> np.ndarray:
    """The validation targets that choose the setting, ascending; the same for all runs."""
    draw = np.random.default_rng(int(context.data.card['fingerprint'], 16))
    number = context.num_targets('validation')
    return np.sort(draw.choice(number, min(number, item_graph.SAMPLE), replace=False))


def _keep(found: GraphBaseline, context: RunContext, paths: list[Path]) -> Path:
    """Writes the baseline to the first of the paths that can be written, which is returned.

    A folder of shared data may be read-only. Where two runs write there at once, both write the
    same, and each replaces the file as a whole.
    """
    card = {
        'version': VERSION,
        'fingerprint': context.data.card['fingerprint'],
        'lists': found.lists,
        'setting': found.setting,
        'chosen_by': found.chosen_by,
    }
    arrays = {
        f'{name}/{protocol}': getattr(of_split, protocol)
        for name, of_split in found.ranks.items()
        for protocol in metrics.PROTOCOLS
    }
    for path in paths:
        try:
            with run_dir.atomic_write(path) as file:
                np.savez_compressed(file, card=json.dumps(card), **arrays)
            return path
        except UserError:
            if path == paths[-1]:
                raise
    raise AssertionError('there is no path')


def _read(path: Path, context: RunContext) -> GraphBaseline | None:
    """The kept baseline; None where there is none, or it is damaged, or of other data."""
    try:
        with np.load(path, allow_pickle=False) as file:
            card: dict[str, Any] = json.loads(str(file['card']))
            if (card['version'], card['fingerprint']) != (
                VERSION,
                context.data.card['fingerprint'],
            ):
                return None
            ranks = {
                name: Ranks(*(file[f'{name}/{protocol}'] for protocol in metrics.PROTOCOLS))
                for name in (*SPLITS, SHUFFLED)
            }
        return GraphBaseline(ranks, card['lists'], card['setting'], card['chosen_by'])
    except (*DAMAGED, TypeError):
        return None
