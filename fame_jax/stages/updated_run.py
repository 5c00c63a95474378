"""The run that an update goes on from: its folder, its settings, its last trained stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fame_jax import run_dir
from fame_jax.config import FLAGS, binds
from fame_jax.config import flags as config_flags
from fame_jax.config.update import Update
from fame_jax.errors import UserError

# An update has few epochs over all windows, in larger steps than its run's and at a rate that falls
# to zero. Its rows of a step and its first learning rate are multiples of those with which the run
# was trained from scratch. Chosen on validation, see docs/updating.md.
EPOCHS, ROWS, RATE = 3, 2, 2.0
# Flags of the run that are not those of an update.
OWN = ('stages', 'workdir', 'prepared', *Update.__dataclass_fields__)


def starting_values(given: config_flags.Given, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an update as its run has them, with the limits and rates of an update.

    Args:
      given: the flags of the command, with --append and --from.
      stored: the flags.cfg of the run in --from.

    Raises:
      UserError: when the folder is no trained run, the update has no folder of its own, or
        --split_at is given and the run is not split by time.
    """
    run, stage = given.get('from_run'), last_stage(given.get('from_run'))
    if not stored:
        raise UserError(f'--from={run} holds no flags.cfg and is no run; give the folder of a run')
    if not given.values.get('workdir'):
        raise UserError('--append needs a folder for the updated run; add --workdir=FOLDER')
    split = stored.get('split', FLAGS['split'].default)
    if split != 'time' and 'split_at' in given.values:
        raise UserError(
            f'--split_at={given.get("split_at")}: the run of --from has --split={split}, which an '
            'update keeps; leave --split_at out'
        )
    values = {name: value for name, value in stored.items() if name not in OWN and binds(name)}
    rate = 'learning_rate' if stage == 'pretrain' else 'finetune_learning_rate'
    is_update = bool(stored.get('append'))  # which has the multiples already
    first_rate = values.get(rate, FLAGS[rate].default) * (1 if is_update else RATE)
    rows = values.get('rows_per_step', FLAGS['rows_per_step'].default) * (1 if is_update else ROWS)
    return values | {
        rate: float(f'{first_rate:.6g}'),
        'rows_per_step': rows,
        f'{stage}_epochs': EPOCHS,
        'patience': EPOCHS,
        'schedule': 'cosine',
        'warmup_epochs': 0.0,
    }


def check_folder(given: config_flags.Given) -> None:
    """Refuses a --workdir in the folder of --from, where an update would write."""
    run, workdir = given.get('from_run'), given.values.get('workdir')
    if run and workdir and Path(workdir).resolve().is_relative_to(Path(run).resolve()):
        raise UserError(
            f'--workdir={workdir} is in the run of --from, which stays as it is; choose another'
        )


def last_stage(run: str) -> str:
    """The last stage that a run has trained, 'pretrain' or 'finetune'.

    Raises:
      UserError: when the folder is not that of a trained run.
    """
    folder = Path(run)
    for stage in ('finetune', 'pretrain'):
        if any((folder / 'checkpoints').glob(f'{stage}/[0-9]*')):
            return stage
    if not folder.is_dir():
        raise UserError(f'--from={run}: there is no such folder; give the folder of a trained run')
    several = run_dir.several_runs(folder, f'--from={run}')
    if several:
        raise several
    if not (folder / 'flags.cfg').is_file():
        raise UserError(f'--from={run} is no run; give the folder that a run was trained in')
    raise UserError(f'--from={run} holds no trained model; train it first')
