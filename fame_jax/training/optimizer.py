"""Adam, with a schedule, an average of the weights, and parameters or rows that stay as they are.

optimizer = make_optimizer(rate, ema=0.998)
averaged_params(params, state)     the average in the optimizer's state, or params without one
carry_state(old, new)              moments and counts of an earlier state, with rows for new items
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
Tree = Any


class Average(NamedTuple):
    """The average of the parameters in the state of the optimizer.

    Fields:
      count: int32, steps taken.
      params: the average, float32, of all parameters that an optimizer moves.
    """

    count: Array
    params: Tree


def make_schedule(
    learning_rate: float, schedule: str, warmup_steps: int, num_steps: int
) -> float | optax.Schedule:
    """The learning rate at each step of a stage.

    Args:
      learning_rate: the greatest rate.
      schedule: 'constant', or 'cosine', which falls to 0 at the last step.
      warmup_steps: in which the rate grows in equal parts from 0.
      num_steps: of the stage.
    """
    if schedule == 'constant' and not warmup_steps:
        return learning_rate
    if schedule == 'constant':
        return optax.linear_schedule(0.0, learning_rate, warmup_steps)
    warmup_steps = min(warmup_steps, max(num_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else learning_rate, learning_rate, warmup_steps, max(num_steps, 1)
    )


def make_optimizer(
    learning_rate: float | optax.Schedule,
    weight_decay: float = 0.0,
    *,
    ema: float = 0.0,
    frozen: Collection[str] = (),
    trained_rows: Mapping[str, Array] | None = None,
) -> optax.GradientTransformation:
    """Adam, with decoupled weight decay where `weight_decay` is not 0.

    Args:
      learning_rate: the step size, or a function of the step. It, the weight decay and `ema` may be
        traced scalars, which are then not 0.
      weight_decay: the decay per step in units of the learning rate.
      ema: decay d of an average of the parameters, a <- d a + (1 - d) params after each step; in
        the first steps d is at most (1 + step) / (10 + step), so that the start does not last. 0:
        no average.
      frozen: names at the top of the parameter tree; these parameters never change and have no
        moments.
      trained_rows: name at the top of the parameter tree -> bool [rows]; rows that are False never
        change, not even by weight decay.
    """
    if _is_set(weight_decay):
        optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    else:
        optimizer = optax.adam(learning_rate)

    def label(params: Tree) -> dict[str, str]:
        return {name: 'frozen' if name in frozen else 'trained' for name in params}

    def zero_rows(updates: Tree, params: Tree = None) -> Tree:
        return updates | {
            name: jnp.where(rows[:, None], updates[name], 0)
            for name, rows in trained_rows.items()
            if name in updates
        }

    if trained_rows:  # after Adam: weight decay would move a row whose gradient is zero
        optimizer = optax.chain(optimizer, optax.stateless(zero_rows))
    if frozen:
        parts = {'trained': optimizer, 'frozen': optax.set_to_zero()}
        optimizer = optax.multi_transform(parts, label)
    if _is_set(ema):  # last, since it needs the whole update
        optimizer = optax.chain(optimizer, _average(ema, frozen))
    return optimizer


def _is_set(value: float | Array) -> bool:
    return not isinstance(value, float | int) or value != 0


def _average(decay: float, frozen: Collection[str]) -> optax.GradientTransformation:
    """Leaves the updates as they are and averages the parameters that they lead to."""

    def init(params: Tree) -> Average:
        moved = {name: jax.tree.map(jnp.copy, params[name]) for name in params.keys() - frozen}
        return Average(jnp.int32(0), moved)

    def update(updates: Tree, state: Average, params: Tree) -> tuple[Tree, Average]:
        now = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        moved = optax.apply_updates(params, updates)
        if frozen:
            moved = {name: moved[name] for name in state.params}
        average = jax.tree.map(lambda old, new: old + (1 - now) * (new - old), state.params, moved)
        return updates, Average(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged_params(params: Tree, optimizer_state: Tree) -> Tree:
    """The parameters with their averages in the optimizer's state; unchanged without one."""
    is_average = lambda node: isinstance(node, Average)  # noqa: E731
    nodes = jax.tree.leaves(optimizer_state, is_leaf=is_average)
    found = [node.params for node in nodes if is_average(node)]
    return {**params, **found[0]} if found else params


def carry_state(old: Tree, new: Tree) -> Tree:
    """A freshly initialised state with the moments and counts of another one.

    Adam's moments and count, and the count of an average, are those of `old`; moments of rows that
    `old` does not have are zeros. Everything else is that of `new`: the average begins from the
    parameters that `new` was made for, and a schedule at its first step.

    Args:
      old: the state of an optimizer of `make_optimizer`, numpy or jax arrays.
      new: a state of such an optimizer for the same parameters, or for larger tables.

    Raises:
      ValueError: when the two states do not have the same moments.
    """
    kinds = (optax.ScaleByAdamState, Average)

    def is_kept(node: Any) -> bool:
        return isinstance(node, kinds)

    olds = [node for node in jax.tree.leaves(old, is_leaf=is_kept) if is_kept(node)]
    news, structure = jax.tree.flatten(new, is_leaf=is_kept)
    places = [n for n, node in enumerate(news) if is_kept(node)]
    if [type(node) for node in olds] != [type(news[n]) for n in places]:
        raise ValueError('the two optimizers keep other moments')
    for place, node in zip(places, olds):
        if isinstance(node, Average):
            news[place] = news[place]._replace(count=_like(node.count, news[place].count))
        else:
            news[place] = jax.tree.map(_like, node, news[place])
    return jax.tree.unflatten(structure, news)


def _like(old: Array, new: Array) -> Array:
    """The values of `old` in the shape and on the devices of `new`; zeros in rows it lacks."""
    values = np.zeros(new.shape, new.dtype)
    if not new.shape:
        return jax.device_put(np.asarray(old, new.dtype), new.sharding)
    rows = min(len(old), len(values))
    if old.shape[1:] != new.shape[1:]:
        raise ValueError(f'moments of shape {old.shape} do not fit {new.shape}')
    values[:rows] = np.asarray(old)[:rows]
    return jax.device_put(values, new.sharding)
