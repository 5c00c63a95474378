"""Where an update starts: the run before, vectors of new items, and windows with new actions.

The stage `update` leaves in the run's folder, below update/:

    update.json    the run before, its stage and step, and the counts of the appended log
    trained.npy    bool [A], the actions that were in a training window of the run before
    waiting.json   actions of new users who have fewer than three
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import run_dir
from fame_jax.config import flags as config_flags
from fame_jax.data import append
from fame_jax.data.dataset import Dataset
from fame_jax.data.windows import Windows, blocks_of_windows, places_in_windows
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models import growth
from fame_jax.stages import text
from fame_jax.stages.context import SPLITS, RunContext, open_run

Tree = Any

FOLDER = 'update'
# Old items whose texts are nearest to that of a new item: its first row is the mean of theirs.
NEAREST = 5


def read_record(folder: Path) -> dict[str, Any]:
    """The content of update.json in a run's folder.

    Raises:
      UserError: when it is missing or damaged.
    """
    path = folder / FOLDER / 'update.json'
    record = run_dir.read_json(path)
    if not isinstance(record, dict) or not {'run', 'stage', 'step'} <= record.keys():
        raise UserError(f'{path} is damaged; remove {folder} and update again')
    return record


def read_waiting(folder: Path) -> append.Waiting:
    """The actions in a run's folder that wait for more of their users; none in other runs."""
    path = folder / FOLDER / 'waiting.json'
    return append.Waiting(**run_dir.read_json(path)) if path.is_file() else append.Waiting()


def describe_run(run: RunContext, stage: str) -> dict[str, Any]:
    """The data and the checkpoint that an update of a run's stage goes on from."""
    progress = run.progress(stage)
    names = ('step', 'best_epoch', 'data_sha256')
    return {'stage': stage, **{name: progress.get(name) for name in names}}


def read_data(run: str) -> tuple[Dataset, float]:
    """The data set of a run, and the least rating of the actions in it (0: all)."""
    given = config_flags.Given({'workdir': run, 'stages': ('recommend',), 'progress': 'none'})
    with contextlib.closing(open_run(given)) as opened:
        return opened.data, opened.config.data.min_rating


@contextlib.contextmanager
def open_run_before(context: RunContext) -> Iterator[RunContext]:
    """The run in --from, for reading; nothing is written there.

    Raises:
      UserError: when it has been trained further since the update was begun.
    """
    folder = context.config.update.from_run
    # With a stage that only uses the run, so that its flags.cfg is not written.
    given = config_flags.Given({'workdir': folder, 'stages': ('recommend',)})
    run = open_run(given, screen=context.screen)
    with contextlib.closing(run):
        if context.is_prepared:
            record = read_record(context.folder)
            found = describe_run(run, record['stage'])
            if any(record.get(name) != value for name, value in found.items()):
                raise UserError(
                    f'--from={folder} has changed since {context.folder} was begun; choose '
                    'another --workdir'
                )
        yield run


def refuse_trained_targets(data: Dataset, trained: np.ndarray, run: str) -> None:
    """Refuses a split that holds out actions which the run has trained on.

    Args:
      data: of the update.
      trained: bool [A], the actions of `data` that the run before has trained on.
      run: its name.

    Raises:
      UserError: with the number of such targets.
    """
    for split in SPLITS:
        _, targets = data.history_bounds(split)
        count = int(np.count_nonzero(trained[targets]))
        if count:
            later = '' if data.time_split is None else 'give a later --split_at, or '
            raise UserError(
                f'{count:,} {split} targets of the new data set are training data of {run}, so '
                f'that their ranks would say too much; {later}train a new run'
            )


def grow(
    context: RunContext, before: RunContext, windows: Windows, trained: Tree, fresh: Tree
) -> Tree:
    """The trained parameters of the run before, with rows for the new items.

    Args:
      context: the update.
      before: the run that it goes on from.
      windows: of all training histories of the update.
      trained: that run's best parameters.
      fresh: parameters for all items, freshly initialised.

    Raises:
      UserError: when the model has other parameters that depend on the number of items.
    """
    num_known = before.data.num_items
    known_V = np.arange(context.data.num_items + 1) <= num_known
    known_V[0] = False
    rounds = []
    if not known_V[1:].all() and context.config.text.item_init == 'text':
        rounds.append(_nearest_by_text(context, before, known_V))
        known_V[list(rounds[0])] = True
    of_text = int(known_V.sum()) - num_known
    of_histories = append.find_rounds(*_neighbours(context, windows), known_V)
    counts = [of_text, sum(map(len, of_histories))]
    counts.append(len(known_V) - 1 - num_known - sum(counts))
    if len(known_V) - 1 > num_known:
        context.screen.say(
            f'update: first rows of {len(known_V) - 1 - num_known:,} new items: {counts[0]:,} '
            f'from their texts, {counts[1]:,} from their neighbours in histories, {counts[2]:,} '
            'random'
        )
    try:
        return growth.grow_params(trained, fresh, num_known, [*rounds, *of_histories])
    except ValueError as error:
        raise UserError(
            f'--model={context.config.model.model} cannot be updated ({error}); train a new run'
        ) from error


def _neighbours(context: RunContext, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of items next to each other in training windows, and in actions that wait.

    The items that validation and test hold out are in no window, so that the row of a new item
    says nothing about them.
    """
    trained = np.zeros(len(context.data.items), bool)
    for block in blocks_of_windows(windows):
        trained[places_in_windows(windows, block)] = True
    items, offsets = context.data.items, context.data.offsets
    pairs = np.flatnonzero(trained[:-1] & trained[1:])
    pairs = pairs[~np.isin(pairs + 1, offsets)]
    waiting = read_waiting(context.folder)
    numbers = {name: number for number, name in enumerate(context.data.item_ids)}
    users, waits = waiting.users, [numbers[name] for name in waiting.items]
    places = [n for n in range(len(users) - 1) if users[n] == users[n + 1]]
    lefts = [*items[pairs].tolist(), *(waits[n] for n in places)]
    rights = [*items[pairs + 1].tolist(), *(waits[n + 1] for n in places)]
    return np.array(lefts, np.int64), np.array(rights, np.int64)


def _nearest_by_text(
    context: RunContext, before: RunContext, known_V: np.ndarray
) -> dict[int, np.ndarray]:
    """New item -> the trained items whose texts are most like its own; without a text, no entry."""
    text_VE = text.encode_items(context)
    trained, _ = before.data.training_histories()
    counts = np.bincount(trained, minlength=len(known_V))
    candidates = np.flatnonzero(known_V & (counts > 0) & text_VE.any(axis=1))
    found = {}
    for item in np.flatnonzero(~known_V & text_VE.any(axis=1)).tolist():
        if item:
            similar = text_VE[candidates] @ text_VE[item]
            order = np.argsort(-similar, kind='stable')[:NEAREST]
            order = order[similar[order] > 0]
            if len(order):
                found[item] = candidates[order]
    return found


def windows_by_epoch(context: RunContext, windows: Windows) -> Callable[[int], Windows]:
    """Epoch number -> the windows of an update: all with new actions, and a share of the others.

    A window with new actions reaches back as far as the model sees, so that they have their whole
    context. The share, --replay, is drawn anew for each epoch.

    Args:
      context: the update.
      windows: of all training histories.
    """
    config, offsets = context.config, context.data.offsets
    path = context.folder / FOLDER / 'trained.npy'
    with explain_os_errors(f'reading {path}'):
        trained = np.load(path, allow_pickle=False)
    starts, ends = windows.starts, windows.starts + windows.lengths
    new_before = np.concatenate([[0], np.cumsum(~trained)])
    has_new = new_before[ends] > new_before[starts + 1]
    history_starts = offsets[np.searchsorted(offsets, starts, side='right') - 1]
    longer = np.maximum(history_starts, ends - (config.data.max_length + 1))
    starts = np.where(has_new, np.minimum(starts, longer), starts)
    new, old = np.flatnonzero(has_new), np.flatnonzero(~has_new)
    # Without new windows, as after an empty day, one of the others keeps the epochs from being
    # empty.
    number = max(round(config.update.replay * len(old)), 0 if len(new) else 1)

    def choose(epoch: int) -> Windows:
        rng = np.random.default_rng([config.run.seed, epoch, 1])
        replayed = rng.choice(old, number, replace=False)
        chosen = np.sort(np.concatenate([new, replayed]))
        return Windows(windows.items, starts[chosen], (ends - starts)[chosen])

    return choose
