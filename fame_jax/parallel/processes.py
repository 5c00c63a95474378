"""Several processes in one run: joining, the chief process, barriers, preemption."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from fame_jax.errors import UserError

# After so many seconds without a heartbeat a process counts as dead, and the others stop.
HEARTBEAT = 30


def connect(address: str, num_processes: int, rank: int) -> None:
    """Joins the processes of one run; must be called before any other use of JAX.

    Args:
      address: HOST:PORT, the same in all processes; the process of rank 0 listens there.
      num_processes: number of processes.
      rank: number of this process, from 0.

    Raises:
      UserError: when the processes cannot reach each other.
    """
    try:
        jax.distributed.initialize(
            address, num_processes, rank, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'--distributed={address},{rank}/{num_processes}: this process cannot join the others: '
            f'{reason}; start all {num_processes} processes with the same free, reachable HOST:PORT'
        ) from error


def is_chief() -> bool:
    """Whether this process writes the run's files: the process of rank 0."""
    return jax.process_index() == 0


def agree(choice: bool) -> bool:
    """The chief's choice, in all processes; all of them must call it together."""
    if jax.process_count() == 1:
        return choice
    return bool(multihost_utils.broadcast_one_to_all(np.array(choice)))


def is_preempted(call: int) -> bool:
    """Whether any process has received SIGTERM; all processes get the same answer.

    Args:
      call: number of this call, counted from 0 in each process; the answer turns true at the same
        call in all of them.
    """
    return multihost_utils.reached_preemption_sync_point(call)


def barrier(name: str) -> None:
    """Waits until all processes have called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
