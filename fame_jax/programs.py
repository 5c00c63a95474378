"""What a device is told: the jitted step, and a block of steps in one dispatch, for every model."""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from fame_jax import sharding
from fame_jax.batch import Batch

Array = jax.Array
Tree = Any
Step = Callable[['State', Batch, Array], tuple['State', tuple[Array, Array]]]


class State(NamedTuple):
    """What a step turns into its successor; donated to it."""

    step: Array  # int32 []
    params: Tree
    optimizer: Tree


def make_optimizer(
    learning_rate: float,
    b2: float,
    weight_decay: float,
    *,
    frozen: Collection[str] = (),
    moving: Mapping[str, Array] | None = None,
) -> optax.GradientTransformation:
    """Adam, with decoupled weight decay if there is any.

    Args:
      learning_rate: the step size.
      b2: the second decay.
      weight_decay: 0 for none.
      frozen: parameters, at the top of the tree, that stay as they are and have no moments.
      moving: for parameters at the top of the tree, bool [rows]: rows that are not True stay.
    """
    if weight_decay:
        optimizer = optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay)
    else:
        optimizer = optax.adam(learning_rate, b2=b2)

    def kinds(params: Tree) -> dict[str, str]:
        return {name: 'frozen' if name in frozen else 'trained' for name in params}

    def hold(updates: Tree, params: Tree = None) -> Tree:
        return updates | {
            name: jnp.where(rows[:, None], updates[name], 0)
            for name, rows in moving.items()
            if name in updates
        }

    if moving:  # after Adam: weight decay would move a row whose gradient is zero
        optimizer = optax.chain(optimizer, optax.stateless(hold))
    if frozen:
        parts = {'trained': optimizer, 'frozen': optax.set_to_zero()}
        optimizer = optax.multi_transform(parts, kinds)
    return optimizer


def make_step(
    objective: Callable[..., tuple[Array, Array]], optimizer: optax.GradientTransformation
) -> Step:
    """The step (state, batch, key) -> (state, (loss sum, weight sum)), jitted, its state donated.

    Args:
      objective: (params, batch, key) -> (sum, count); the step descends on their quotient. Arrays
        that a `jax.tree_util.Partial` of it holds are arguments of the program, and no constants.
      optimizer: an optax transformation.

    The step folds its number into the key, so a resumed run draws what an uninterrupted one does.
    """

    def step(
        objective: Partial, state: State, batch: Batch, key: Array
    ) -> tuple[State, tuple[Array, Array]]:
        step_key = jax.random.fold_in(key, state.step)

        def mean_loss(params: Tree) -> tuple[Array, tuple[Array, Array]]:
            total, count = objective(params, batch, step_key)
            return total / jnp.maximum(count, 1), (total, count)

        grads, sums = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, optimizer_state), sums

    return Partial(jax.jit(step, donate_argnums=1), _as_partial(objective))


def _as_partial(function: Callable[..., Any]) -> Partial:
    return function if isinstance(function, Partial) else Partial(function)


class Program:
    """A block of steps in one dispatch, compiled once for each shape that batches have.

    One step a dispatch or many: the loop's body is the same, and so are all bits of the result.
    """

    def __init__(
        self,
        step: Step,
        size: int = 1,
        mesh: jax.sharding.Mesh | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        """Compiles nothing yet.

        Args:
          step: of `make_step`.
          size: most steps in a dispatch.
          mesh: the devices that share the rows of a batch, and the tables of the state.
          compiler_options: XLA's, for this program alone.
        """
        self.size = size
        self._options = compiler_options
        # A stack of one would need no slicing, and be another program that may round otherwise.
        self._room = max(size, 2)
        self._step = _as_partial(step)
        self._mesh = mesh
        self._place = sharding.feeder(mesh, axis=1)
        self._compiled: dict[tuple, Any] = {}
        self._compiling = 0.0
        self._lock = threading.Lock()

    def __call__(self, state: State, batches: Sequence[Batch], key: Array) -> tuple[State, Array]:
        """Takes as many steps as there are batches, of one shape.

        Returns:
          The state, and float32 [steps, 2]: each step's loss sum and weight sum, then zeros.
        """
        compiled = self.compile(state, batches[0], key)
        return compiled(
            self._step, state, self._place(stack(batches, self._room)), len(batches), key
        )

    def compile(self, state: State, batch: Batch, key: Array) -> Any:
        """The program for batches of this shape; of the state, shapes and places are enough.

        A thread that asks for what another one is compiling waits for it.
        """
        shape = tuple(field.shape for field in jax.tree.leaves(batch))
        with self._lock:
            if shape not in self._compiled:
                began = time.monotonic()
                batches = self._place(stack([batch], self._room))
                # What comes out lies where it came from, or the next block would not fit.
                places = sharding.placement((state, jnp.zeros(())), self._mesh)
                run = jax.jit(
                    self._run, donate_argnums=1, out_shardings=places if self._mesh else None
                )
                lowered = run.lower(self._step, state, batches, 0, key)
                self._compiled[shape] = lowered.compile(self._options)
                self._compiling += time.monotonic() - began
            return self._compiled[shape]

    def compiling(self) -> float:
        """Seconds that went into compiling since this was asked before."""
        seconds, self._compiling = self._compiling, 0.0
        return seconds

    def _run(
        self, step: Partial, state: State, batches: Batch, count: int, key: Array
    ) -> tuple[State, Array]:
        def one(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            state, sums = carry
            batch = jax.tree.map(lambda field: field[i], batches)
            state, told = step(state, batch, key)
            return state, sums.at[i].set(jnp.stack(told))

        # A count that only the device knows: the last block of an epoch is no other program.
        return jax.lax.fori_loop(0, count, one, (state, jnp.zeros((self._room, 2))))


def stack(batches: Sequence[Batch], size: int) -> Batch:
    """Batches of one shape as one, fields [size, ...], zeros after the last."""

    def one(*fields: np.ndarray) -> np.ndarray:
        out = np.zeros((size, *fields[0].shape), fields[0].dtype)
        out[: len(fields)] = fields
        return out

    return jax.tree.map(one, *batches)


def begin(
    params: Tree, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh | None
) -> State:
    """The state before the first step; the optimizer's tables lie where the parameters' do."""
    step = sharding.born(lambda: jnp.int32(0), mesh)()
    return State(step, params, sharding.born(optimizer.init, mesh)(params))


def outline(
    params: Tree, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh | None
) -> State:
    """The shapes and places of the state that `begin` makes, from those of the parameters."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return sharding.outline(State(step, params, jax.eval_shape(optimizer.init, params)), mesh)
