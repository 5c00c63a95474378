"""Where arrays live: a mesh of devices, data x model, and the place of each of a run's arrays.

Batches are split over `data`. Item tables and their moments in the optimizer are split by items
over `model`; everything else is held whole by every device. A table's rows are rounded up to a
multiple of the devices that share it; the rows past V are nobody's item.

One device is no mesh: None, and then nothing here does anything. Processes of one run, connected by
`connect`, see the devices of all as one list; each feeds those that are its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fame_jax.errors import UserError

Array = jax.Array
Tree = Any

DATA, MODEL = 'data', 'model'

# Parameters by item id, [rows, D].
TABLES = ('item_table', 'frozen_table', 'output_table')

# Seconds without a sign of life after which a process is given up by the others.
HEARTBEAT = 30


def connect(coordinator: str, num_processes: int, process: int) -> None:
    """Joins the processes of one run; before anything else is asked of jax.

    Args:
      coordinator: host:port, the same for all; the first process listens there.
      num_processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      UserError: when they do not find one another.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        what = ' '.join(str(error).split())[:200]
        raise UserError(
            f'--coordinator={coordinator}: process {process} of {num_processes} cannot join the '
            f'others: {what}; start all of them, with one address that is free and within reach'
        ) from error


def make_mesh(data: int, model: int) -> Mesh | None:
    """The devices of all processes as a mesh; None where one device does everything.

    Raises:
      UserError: when there are not that many devices, or processes would have none of them.
    """
    if data * model == 1 and jax.process_count() == 1:
        return None
    asked = f'--data_parallel={data} times --model_parallel={model}'
    if data * model > jax.device_count():
        raise UserError(
            f'{asked} asks for {data * model} devices and there are {jax.device_count()}; ask for '
            'fewer'
        )
    if jax.process_count() > 1 and data * model != jax.device_count():
        raise UserError(
            f'{asked} asks for {data * model} devices and the processes have '
            f'{jax.device_count()}; ask for all of them'
        )
    types = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=types, devices=devices)


def table_rows(num_items: int, mesh: Mesh | None) -> int:
    """Rows of an item table: V + 1, rounded up to a multiple of the devices that share it."""
    shared_by = mesh.shape[MODEL] if mesh else 1
    return -(-(num_items + 1) // shared_by) * shared_by


def placement(tree: Tree, mesh: Mesh | None) -> Tree:
    """Where each array of a tree lives, a sharding a leaf: tables are split, the rest is whole.

    The leaves need no more than a shape. Moments of a table are found by the table's name.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding | jax.sharding.SingleDeviceSharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        names = {getattr(key, 'key', None) for key in path}
        split = names.intersection(TABLES) and len(leaf.shape) == 2
        return NamedSharding(mesh, PartitionSpec(MODEL) if split else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def by_items(mesh: Mesh | None) -> NamedSharding | None:
    """The place of what has a row an item, table or vectors; None where that needs no telling."""
    return NamedSharding(mesh, PartitionSpec(MODEL)) if mesh else None


def outline(tree: Tree, mesh: Mesh | None) -> Tree:
    """Shapes and dtypes of a tree's arrays, each with its place."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        placement(tree, mesh),
    )


def born(make: Callable[..., Tree], mesh: Mesh | None) -> Callable[..., Tree]:
    """`make`, jitted so that what it returns is made where it shall live, and nowhere whole."""

    def placed(*args: Any) -> Tree:
        places = placement(jax.eval_shape(make, *args), mesh)
        return jax.jit(make, out_shardings=places if mesh else None)(*args)

    return placed


def placed(tree: Tree, mesh: Mesh | None) -> Tree:
    """The tree where it shall live, from wherever it was."""
    if mesh is None:
        return tree
    return jax.jit(lambda same: same, out_shardings=placement(tree, mesh))(tree)


def feeder(mesh: Mesh | None, axis: int) -> Callable[[Tree], Tree]:
    """What puts numpy batches on the devices, split over `data` along an axis.

    Each process gives the rows that `rows_of_process` lets it have.
    """
    if mesh is None:
        return lambda batch: batch
    place = NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))

    def put(batch: Tree) -> Tree:
        return jax.tree.map(
            lambda field: jax.make_array_from_process_local_data(place, field), batch
        )

    return put


def rows_of_process(mesh: Mesh | None, num_rows: int) -> slice:
    """The rows of a batch that this process's devices hold, of num_rows in all."""
    if mesh is None:
        return slice(0, num_rows)
    held = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((num_rows,))
    bounds = [index.indices(num_rows) for (index,) in held.values()]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


def whole(array: Array) -> np.ndarray:
    """An array from wherever its parts are, in the host's memory; all processes ask together."""
    if not isinstance(array, Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_chief() -> bool:
    """Whether this process is the one that writes the run's files."""
    return jax.process_index() == 0


def agreed(choice: bool) -> bool:
    """The first process's choice, for all of them; they ask together."""
    if jax.process_count() == 1:
        return choice
    return bool(multihost_utils.broadcast_one_to_all(np.array(choice)))


def is_preempted(call: int) -> bool:
    """Whether any process was sent SIGTERM; all processes hear it at the same call, from 0 on."""
    return multihost_utils.reached_preemption_sync_point(call)


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
