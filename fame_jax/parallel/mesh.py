"""The mesh of devices, data x model, and the sharding of a run's arrays.

Batches are split over `data`. Item tables and their optimizer moments are split by items over
`model`; all other arrays are replicated. A table's rows are rounded up to a multiple of the devices
along `model`; the rows past V are padding.

With one device there is no mesh: `make_mesh` returns None, and the functions here then leave arrays
where they are. The processes of one run (see `processes.py`) share one list of devices; each
process feeds its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fame_jax.errors import UserError

Array = jax.Array
Tree = Any

DATA, MODEL = 'data', 'model'
MEMBERS = 'members'  # the axis of a mesh of its own; see training/members.py

# Names of parameters and constants with a row per item, [rows, D] and [rows, E].
TABLES = ('item_table', 'text_vectors')


def make_mesh(data: int, model: int) -> Mesh | None:
    """A mesh of the devices of all processes; None for one device.

    Raises:
      UserError: when there are fewer devices, or some process would have no device in the mesh.
    """
    if data * model == 1 and jax.process_count() == 1:
        return None
    sizes = (
        f'--data_parallel={data} --model_parallel={model}: the mesh needs {data * model} devices'
    )
    if data * model > jax.device_count():
        raise UserError(f'{sizes} and there are {jax.device_count()}; choose a smaller mesh')
    if jax.process_count() > 1 and data * model != jax.device_count():
        raise UserError(
            f'{sizes} and the processes have {jax.device_count()}; choose a mesh of all of them'
        )
    types = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=types, devices=devices)


def make_member_mesh(number: int) -> Mesh | None:
    """A mesh of devices that share so many runs of one program; None for one device."""
    devices = jax.devices()[:number]
    if len(devices) < 2 or jax.process_count() > 1:
        return None
    return jax.make_mesh((len(devices),), (MEMBERS,), axis_types=(AxisType.Auto,), devices=devices)


def share_members(tree: Tree, mesh: Mesh | None) -> Tree:
    """A tree of arrays [S, ...], or of their shapes, with an equal part of S on each device."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(MEMBERS))

    def share(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(share, tree)


def table_rows(num_items: int, mesh: Mesh | None) -> int:
    """Rows of an item table: V + 1, rounded up to a multiple of the devices along `model`."""
    num_shards = mesh.shape[MODEL] if mesh else 1
    return -(-(num_items + 1) // num_shards) * num_shards


def shardings(tree: Tree, mesh: Mesh | None) -> Tree:
    """The sharding of each leaf: item tables are split over `model`, other arrays replicated.

    Args:
      tree: parameters, or a state with optimizer moments; leaves need only a shape. A leaf belongs
        to an item table if a key of its path is the table's name.
      mesh: the devices; None: the first device.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding | SingleDeviceSharding:
        if mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        names = {getattr(key, 'key', None) for key in path}
        is_table = names.intersection(TABLES) and len(leaf.shape) == 2
        return NamedSharding(mesh, PartitionSpec(MODEL) if is_table else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def item_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of an array with a row per item; None on one device, where JAX chooses it."""
    return NamedSharding(mesh, PartitionSpec(MODEL)) if mesh else None


def abstract(tree: Tree, mesh: Mesh | None) -> Tree:
    """A tree of `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings of the leaves."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def init_sharded(init: Callable[..., Tree], mesh: Mesh | None) -> Callable[..., Tree]:
    """`init`, jitted so that each array is created with its sharding, never whole on one device.

    It is compiled once for all calls, whose arguments have the same shapes.
    """
    if mesh is None:
        return jax.jit(init)
    jitted = None

    def init_on_mesh(*args: Any) -> Tree:
        nonlocal jitted
        if jitted is None:  # the shardings follow from the shapes, which the arguments decide
            out_shardings = shardings(jax.eval_shape(init, *args), mesh)
            jitted = jax.jit(init, out_shardings=out_shardings)
        return jitted(*args)

    return init_on_mesh


def device_put(tree: Tree, mesh: Mesh | None) -> Tree:
    """The tree with the shardings of `shardings`; unchanged without a mesh."""
    if mesh is None:
        return tree
    return jax.jit(lambda same: same, out_shardings=shardings(tree, mesh))(tree)


def host_to_device(mesh: Mesh | None, axis: int) -> Callable[[Tree], Tree]:
    """A function that puts numpy batches on the devices, split over `data` along an axis.

    Each process passes the rows of `process_rows`. Without a mesh the batch is returned unchanged.
    """
    if mesh is None:
        return lambda batch: batch
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))

    def put(batch: Tree) -> Tree:
        return jax.tree.map(
            lambda field: jax.make_array_from_process_local_data(sharding, field), batch
        )

    return put


def process_rows(mesh: Mesh | None, num_rows: int) -> slice:
    """The rows of a batch of num_rows that belong to this process's devices."""
    if mesh is None:
        return slice(0, num_rows)
    rows = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((num_rows,))
    bounds = [index.indices(num_rows) for (index,) in rows.values()]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


def gather(array: Array) -> np.ndarray:
    """The whole array in host memory, from all its shards; all processes must call it together."""
    if not isinstance(array, Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
