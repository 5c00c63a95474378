"""The stage prepare: an interaction log to the prepared data of a run."""

import contextlib
import dataclasses
import time
from typing import Any

from fame_jax.data import card, changes
from fame_jax.data import prepare as data_prepare
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.parallel import processes
from fame_jax.screen import duration, size
from fame_jax.stages import settings
from fame_jax.stages.context import RunContext


def prepare(context: RunContext) -> None:
    """Reads, filters and renumbers the data set, unless the folder holds it already.

    Raises:
      UserError: for a faulty log, or one that has changed since it was prepared.
    """
    context.begin_writing()
    if context.is_prepared:
        _refuse_changed_log(context)
        context.screen.say(f'prepare: {context.dataset_folder} exists already')
        if context.config.data.split == 'time':
            _ = context.data  # refused here where it cannot be split
    elif context.config.data.prepared:
        raise settings.no_data(context.config.data.prepared)
    elif processes.is_chief():
        _prepare(context)
    processes.barrier('prepare')


def _refuse_changed_log(context: RunContext) -> None:
    log = context.find_changed_log()
    if log is not None:
        later = [stage for stage in context.config.run.stages if stage != 'prepare']
        raise UserError(
            f'{log} has changed since {context.dataset_folder} was prepared from it; choose '
            'another --workdir for the new one, or go on with what was prepared by '
            f'--stages={",".join(later) or "pretrain,evaluate"}, without prepare'
        )


def _prepare(context: RunContext) -> None:
    began, options, screen = time.monotonic(), context.config.data, context.screen
    files: dict[str, Any] = {}
    if options.dataset != 'synthetic':
        with screen.waiting(f'prepare: looking for {options.dataset}'):
            path = data_prepare.find_file(options.dataset, options.data_dir)
        files = {'files': changes.describe_files(path)}
        doing = f'prepare: reading {path} ({size(files["files"]["bytes"])})'
    else:
        doing = 'prepare: generating synthetic data'
    screen.say(doing)
    with screen.waiting(doing):
        data = data_prepare.prepare(
            options.dataset,
            data_dir=options.data_dir,
            columns={k: v for k, v in options.column_names.items() if k != 'item_file_id'},
            min_rating=options.min_rating,
            k_core=options.k_core,
            max_user_actions=options.max_user_actions,
            duplicates=options.duplicates,
            synthetic=options.synthetic_options,
        )
    if files and changes.describe_files(path) != files['files']:
        raise UserError(f'{path} has changed while it was read; run the same command again')
    split = context.split(data)  # refused before anything is written
    with screen.waiting(f'prepare: writing {context.dataset_folder}'):
        save_data(context, dataclasses.replace(data, card=data.card | files))
    for line in (*card.describe_steps(data.card), data.describe()):
        screen.say(f'prepare: {line}')
    if split.split.is_by_time:
        context.say_split()
    screen.say(f'prepare: {duration(time.monotonic() - began)}, in {context.dataset_folder}')


def save_data(context: RunContext, data: Dataset) -> None:
    """Writes flags.cfg and the data set into the run's folder: both or none.

    The data set is written without its split, which is the run's: see `RunContext.split`.

    Raises:
      UserError: when they cannot be written.
    """
    context.begin_writing()
    path = context.folder / 'flags.cfg'
    before = path.read_bytes() if path.exists() else None
    context.write_flags()  # first: data without flags would fit every command
    try:
        dataclasses.replace(data, time_split=None).save(context.dataset_folder)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink() if before is None else path.write_bytes(before)
        raise
