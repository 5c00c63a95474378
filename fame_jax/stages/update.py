"""The stage update: new actions are appended to a run's data, and its training goes on.

The run in --from stays as it is. The update is a run of its own, with a data set of all actions and
a checkpoint of the stage that the other run trained last, so that every other stage can use it.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import run_dir
from fame_jax.data import append, sources
from fame_jax.data.windows import blocks_of_windows, places_in_windows
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.screen import duration
from fame_jax.stages import train, update_start, updated_run
from fame_jax.stages.context import RunContext
from fame_jax.stages.prepare import save_data
from fame_jax.stages.update_start import FOLDER


def update(context: RunContext, frame: Any = None) -> None:
    """Appends the new actions, unless the folder has them already, and trains on.

    Args:
      context: the update's run.
      frame: the new actions, in the place of the file of --append.

    Raises:
      UserError: for a log that does not fit the run's, or another one than was appended before.
    """
    source = context.config.update.append if frame is None else frame
    context.begin_writing()
    if context.is_prepared:
        _refuse_other_log(context, source)
        context.screen.say(f'update: {context.dataset_folder} exists already')
    else:
        _append(context, source)
    train.train(context, update_start.read_record(context.folder)['stage'])


def _append(context: RunContext, source: Any) -> None:
    began, screen, config = time.monotonic(), context.screen, context.config
    run, options = config.update.from_run, config.data
    with update_start.open_run_before(context) as before:
        if before.config.text.text_path:
            raise UserError(
                f'--from={run}: a run with --text_path cannot be updated, since new items have no '
                'text vector in it; train a new run'
            )
        data, stage = before.data, updated_run.last_stage(run)
        if not before.is_finished(stage):
            screen.say(f'update: {stage} of {run} is not finished; its best epoch is used')
        with screen.waiting(f'update: reading {_name(source)}'):
            log = append.read_like(source, data, options.min_rating)
        with screen.waiting('update: appending'):
            appended = append.append_log(
                data,
                log,
                update_start.read_waiting(before.folder),
                run=run,
                min_rating=options.min_rating,
                max_user_actions=options.max_user_actions,
                duplicates=options.duplicates,
                split_at=options.split_at,
            )
        trained = np.zeros(len(appended.data.items), bool)
        trained[_trained_places(before, appended.old_places)] = True
        update_start.refuse_trained_targets(appended.data, trained, run)
        record = {'run': run, **update_start.describe_run(before, stage), **appended.record}
    _write(context.folder / FOLDER, record, trained, appended.waiting)
    save_data(context, appended.data)  # last: a folder that has the data has all
    for line in (*append.describe(appended, options.k_core), appended.data.describe()):
        screen.say(f'update: {line}')
    screen.say(f'update: {duration(time.monotonic() - began)}, in {context.dataset_folder}')


def _trained_places(before: RunContext, places: np.ndarray) -> np.ndarray:
    """Where the actions of the run's training windows are in the new data set."""
    windows = train.make_windows(before)
    found = [places[places_in_windows(windows, block)] for block in blocks_of_windows(windows)]
    found = np.concatenate(found)
    return found[found >= 0]


def _write(
    folder: Path, record: dict[str, Any], trained: np.ndarray, waiting: append.Waiting
) -> None:
    with explain_os_errors(f'making the folder {folder}'):
        folder.mkdir(exist_ok=True)
    with run_dir.atomic_write(folder / 'trained.npy') as file:
        np.save(file, trained)
    run_dir.write_json(folder / 'waiting.json', waiting._asdict())
    run_dir.write_json(folder / 'update.json', record)


def _name(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else 'the frame'


def _refuse_other_log(context: RunContext, source: Any) -> None:
    """Refuses a log that is not the one that was appended; a file that is gone is not needed."""
    record = update_start.read_record(context.folder)
    if isinstance(source, str | os.PathLike):
        if not Path(source).exists():
            return
        same = sources.open_source(source).sha256 == record['sha256']
    else:
        log = append.read_like(source, context.data, context.config.data.min_rating)
        same = append.digest(log) == record['actions_sha256']
    if not same:
        raise UserError(
            f'{_name(source)} is not the log that {context.folder} was updated with, or has '
            'changed since; choose another --workdir for it'
        )
