"""The jitted training step, and blocks of steps that the device takes in one dispatch.

step = make_step(objective, optimizer)     one update; pure, its state donated
program = Program(step, size=8)            up to eight steps a dispatch
program.precompile(state, batch, key)      traced here, compiled by XLA in another thread
state, sums = program(state, batches, key)
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from fame_jax.batch import Batch
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.training import packed

Array = jax.Array
Tree = Any
# (params, batch, key) -> (loss sum, weight sum, metrics)
Objective = Callable[[Tree, Batch, Array], tuple[Array, Array, dict[str, Array]]]
# (state, batch, key) -> (state, sums)
Step = Callable[['State', Batch, Array], tuple['State', dict[str, Array]]]


class State(NamedTuple):
    """What a step reads and writes; its buffers are donated to the step.

    Fields:
      step: int32 scalar, the number of steps taken.
      params: the model's parameters.
      optimizer: the optimizer's state.
    """

    step: Array
    params: Tree
    optimizer: Tree


def make_step(objective: Objective, optimizer: optax.GradientTransformation) -> Step:
    """Makes the jitted step (state, batch, key) -> (state, sums).

    The step minimises loss sum / weight sum of the batch. It folds its own number into the key, so
    that a resumed run draws the random numbers that an uninterrupted run draws.

    Args:
      objective: (params, batch, key) -> (loss sum, weight sum, metrics), float32 scalars. Arrays
        bound to it by `jax.tree_util.Partial` are arguments of the program; arrays in a closure
        would be constants of it.
      optimizer: an optax transformation.

    Returns:
      The step. Its `sums` hold 'loss' and 'weight', the two sums, and the metrics.
    """

    step = functools.partial(take_step, optimizer=optimizer)
    return Partial(jax.jit(step, donate_argnums=1), _as_partial(objective))


def take_step(
    objective: Objective,
    state: State,
    batch: Batch,
    key: Array,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[State, dict[str, Array]]:
    """One step, not jitted; arguments and results as in `make_step`."""
    step_key = jax.random.fold_in(key, state.step)

    def mean_loss(params: Tree) -> tuple[Array, dict[str, Array]]:
        loss, weight, metrics = objective(packed.unpack_all(params), batch, step_key)
        return loss / jnp.maximum(weight, 1), {'loss': loss, 'weight': weight, **metrics}

    grads, sums = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, optimizer_state), sums


def _as_partial(function: Callable[..., Any]) -> Partial:
    return function if isinstance(function, Partial) else Partial(function)


class Program:
    """A block of steps in one dispatch, compiled once for each shape of the batches.

    The body of the loop is the same for every block size, and so is every bit of the result.
    Tracing happens in the caller's thread, so that an error in a model or a loss has a stack that
    leads back to the caller; only XLA's work may happen in another thread.
    """

    def __init__(
        self,
        step: Step,
        size: int = 1,
        mesh: jax.sharding.Mesh | None = None,
        packs: bool = False,
    ):
        """Compiles nothing yet.

        Args:
          step: made by `make_step`.
          size: the most steps in a dispatch.
          mesh: the devices that share the rows of a batch and the tables of the state.
          packs: whether small parameters and their moments are one array during a dispatch; only
            for an optimizer that treats all parameters alike. See `packed`.
        """
        self.size, self.packs = size, packs
        # XLA unrolls a loop over one batch, which may round otherwise; so there is room for two.
        self._room = max(size, 2)
        self._step = _as_partial(step)
        self._mesh = mesh
        self._to_device = mesh_lib.host_to_device(mesh, axis=1)
        self._compiled: dict[tuple, concurrent.futures.Future] = {}
        self._seconds = 0.0

    def __call__(
        self, state: State, batches: Sequence[Batch], key: Array
    ) -> tuple[State, dict[str, Array]]:
        """Takes one step for each batch; all batches have one shape.

        Returns:
          The new state, and the steps' sums, float32 [room] each: a value a step, then zeros.
        """
        compiled = self.precompile(state, batches[0], key).result()
        return compiled(
            self._step, state, self._to_device(stack(batches, self._room)), len(batches), key
        )

    def precompile(
        self,
        state: State,
        batch: Batch,
        key: Array,
        executor: concurrent.futures.Executor | None = None,
    ) -> concurrent.futures.Future:
        """Traces the program for batches of this shape, and has XLA compile it.

        Args:
          state: arrays, or their shapes and shardings.
          batch: any batch of the shape.
          key: the stage's key.
          executor: where XLA compiles; None: here and now.

        Returns:
          The future of the compiled program.
        """
        shapes = _shapes(batch)
        if shapes in self._compiled:
            return self._compiled[shapes]
        began = time.monotonic()
        batches = self._to_device(stack([batch], self._room))
        sums = jax.eval_shape(self._step, state, jax.tree.map(lambda x: x[0], batches), key)[1]
        # The new state gets the shardings of the old one, so that it fits the next block.
        shardings = mesh_lib.shardings((state, sums), self._mesh)
        block = jax.jit(
            self._run_block,
            donate_argnums=1,
            out_shardings=shardings if self._mesh else None,
        )
        lowered = block.lower(self._step, state, batches, 0, key)
        self._seconds += time.monotonic() - began

        def compile_block() -> Any:
            began = time.monotonic()
            compiled = lowered.compile()
            self._seconds += time.monotonic() - began
            return compiled

        if executor is None:
            self._compiled[shapes] = concurrent.futures.Future()
            self._compiled[shapes].set_result(compile_block())
        else:
            self._compiled[shapes] = executor.submit(compile_block)
        return self._compiled[shapes]

    def compiled(self, batch: Batch) -> jax.stages.Compiled:
        """XLA's program for batches of this shape, after `precompile`; waits for the compiler."""
        return self._compiled[_shapes(batch)].result()

    def pop_compile_seconds(self) -> float:
        """Seconds of tracing and compiling since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _run_block(
        self, step: Partial, state: State, batches: Batch, count: int, key: Array
    ) -> tuple[State, dict[str, Array]]:
        if self.packs:  # the step's number has the axis of the members, if there is one
            state = packed.pack_all(state.params, state, state.step.ndim)
        first = jax.tree.map(lambda field: field[0], batches)
        sums = jax.eval_shape(step, state, first, key)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros((self._room, *x.shape), x.dtype), sums)

        def take_step(i: Array, carry: tuple[State, Tree]) -> tuple[State, Tree]:
            state, sums = carry
            batch = jax.tree.map(lambda field: field[i], batches)
            state, new = step(state, batch, key)
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), sums, new)

        # The count is an argument on the device, so the shorter last block is the same program.
        state, sums = jax.lax.fori_loop(0, count, take_step, (state, zeros))
        return packed.unpack_all(state), sums


def _shapes(batch: Batch) -> tuple:
    return tuple(field.shape for field in jax.tree.leaves(batch))


def stack(batches: Sequence[Batch], size: int) -> Batch:
    """Stacks batches of one shape, fields [size, ...], with zeros after the last batch."""

    def stack_field(*fields: np.ndarray) -> np.ndarray:
        out = np.zeros((size, *fields[0].shape), fields[0].dtype)
        out[: len(fields)] = fields
        return out

    return jax.tree.map(stack_field, *batches)


def init_state(
    params: Tree, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh | None
) -> State:
    """The state before the first step; moments of a table are sharded as the table is."""
    step = mesh_lib.init_sharded(lambda: jnp.int32(0), mesh)()
    return State(step, params, mesh_lib.init_sharded(optimizer.init, mesh)(params))


def abstract_state(
    params: Tree, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh | None
) -> State:
    """Shapes, dtypes and shardings of `init_state`, from those of the parameters."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return mesh_lib.abstract(State(step, params, jax.eval_shape(optimizer.init, params)), mesh)
