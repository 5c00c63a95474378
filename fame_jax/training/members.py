"""Runs of one model, trained at once in one program; each run is a member.

Members differ in their seeds, and in settings that are numbers in the program.

step = make_member_step(step)              the step of one run, for all members
program = Program(step, size)              blocks of steps, as for one run
fit_members(members, 3, program, screen)   epochs until every member has ended

A member has the parameters, batches, dropout, negatives, validation and early stop of a run of its
own. The program keeps its size: the results of members that have ended are
discarded, because compiling again takes longer than computing them.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from fame_jax.batch import Batch
from fame_jax.errors import Interrupted
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.screen import Screen, duration
from fame_jax.training.loop import SELECT_ON, Epoch, Loop
from fame_jax.training.signals import catch_signals
from fame_jax.training.step import Program, State, Step

Array = jax.Array
Tree = Any


class MemberBatch(NamedTuple):
    """A batch of each member, S of them.

    Fields:
      batch: fields [S, B, L].
      is_live_S: bool; False for a member whose epoch has ended, which must not change.
      numbers_SN: float32, the settings in which the members differ, N of each; N may be 0.
    """

    batch: Batch
    is_live_S: np.ndarray
    numbers_SN: np.ndarray


@dataclasses.dataclass
class Member:
    """One run among those that train together.

    Attributes:
      name: as the screen names it, such as 'seed 1'.
      loop: its state, progress, checkpoints and log.
      epochs: epoch number, from 0 -> its batches.
      before_epoch: (params, epoch) -> params, as `loop.fit` takes it.
      numbers_N: float32, the settings in which it may differ from the others.
      data: the epoch that it takes now.
    """

    name: str
    loop: Loop
    epochs: Callable[[int], Epoch]
    before_epoch: Callable[[Tree, int], Tree]
    numbers_N: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    data: Epoch | None = None


def make_member_step(
    step: Callable[..., tuple[State, dict[str, Array]]],
    unravel: Callable[[Array], Tree] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Step:
    """The step of all members, (state, batch, key) -> (state, sums), each with a leading axis S.

    Each operation computes all members (`jax.vmap`); its rounding may differ from that of one.

    Args:
      step: of one run, (state, batch, key) -> (state, sums), such as one of `make_step`. With
        `unravel`: (numbers, state, batch, key) -> (state, sums).
      unravel: a row of `MemberBatch.numbers_SN` -> the settings by which the members differ, the
        first argument of `step`; None: they differ in none.
      mesh: devices with one axis, which share the members; S is a multiple of their number. A
        device computes its own members, and nothing is exchanged. None: one device.
    """

    def one(
        step: Callable[..., tuple[State, dict[str, Array]]], state: State, batch: Tree, key: Array
    ) -> tuple[State, dict[str, Array]]:
        batch, is_live, numbers_N = batch
        numbers = [] if unravel is None else [unravel(numbers_N)]
        new, sums = step(*numbers, state, batch, key)
        new = jax.tree.map(lambda new, old: jnp.where(is_live, new, old), new, state)
        return new, jax.tree.map(lambda x: jnp.where(is_live, x, 0), sums)

    def member_step(
        step: Partial, state: State, batch: MemberBatch, key: Array
    ) -> tuple[State, dict[str, Array]]:
        of_members = jax.vmap(functools.partial(one, step))
        if mesh is not None:
            axis = PartitionSpec(mesh.axis_names[0])
            of_members = jax.shard_map(of_members, mesh=mesh, in_specs=axis, out_specs=axis)
        return of_members(state, tuple(batch), key)

    jitted = jax.jit(member_step, donate_argnums=1)
    return Partial(jitted, step if isinstance(step, Partial) else Partial(step))


def fit_members(
    members: Sequence[Member],
    places: int,
    program: Program,
    screen: Screen,
    mesh: jax.sharding.Mesh | None = None,
    until: int | None = None,
) -> None:
    """Trains members, whose loops have started, until each has reached a limit.

    Args:
      members: in the order of their axis.
      places: S, the length of that axis; larger than the number of members where some have ended
        before.
      program: of a step by `make_member_step`.
      screen: the terminal: a bar of the steps, and a line an epoch.
      mesh: the devices that share the members, as `make_member_step` has it.
      until: stops after this epoch and saves; None: at a limit.

    Raises:
      Interrupted: after SIGTERM or SIGINT; every member is saved.
      UserError: when a loss or a score is not finite.
    """
    for member in members:
        member.loop.saving_together = len(members)
    with catch_signals() as signal_received:
        while active := [member for member in members if member.loop.goes_on(until)]:
            _take_epoch(active, places, program, screen, mesh, signal_received)
    for member in members:
        member.loop.save_new()


def _take_epoch(
    members: Sequence[Member],
    places: int,
    program: Program,
    screen: Screen,
    mesh: jax.sharding.Mesh | None,
    signal_received: Callable[[], int],
) -> None:
    """An epoch of each member, which may be at different epochs after an interruption."""
    loops, empty = [member.loop for member in members], places - len(members)
    for member in members:
        member.data = member.loop.open_epoch(member.epochs, member.before_epoch)
    first, stage = loops[0], loops[0].log.stage
    done = [loop.progress.data['next_index'] if loop.progress.data else 0 for loop in loops]
    began_at = list(done)
    most = max(member.data.num_steps - n for member, n in zip(members, done))
    screen.begin(stage, first.progress.epoch, first.limits.epochs, most, 0)
    began, pending = time.monotonic(), None
    state = stack_trees([loop.state for loop in loops] + [first.state] * empty)
    numbers = [member.numbers_N for member in members] + [members[0].numbers_N] * empty
    key = jnp.stack([loop.key for loop in loops] + [first.key] * empty)
    state, key = mesh_lib.share_members((state, key), mesh)
    for loop in loops:
        loop.state = None  # a second copy would take the memory of the stack once more
    while any(
        blocks := [list(itertools.islice(member.data.batches, program.size)) for member in members]
    ):
        state, sums = program(state, stack_members(blocks + [[]] * empty, numbers), key)
        for s, block in enumerate(blocks):
            loops[s].progress.step += len(block)
            done[s] += len(block)
        _add_sums(loops, pending)
        pending = sums, [len(block) for block in blocks]
        screen.steps(max(map(len, blocks)))
        signal = signal_received()
        unfinished = [s for s, member in enumerate(members) if done[s] < member.data.num_steps]
        if unfinished and (signal or any(loop.checkpoint_due() for loop in loops)):
            _add_sums(loops, pending)
            pending = None
            for s, part in enumerate(unstack_tree(state, places)):
                if s in unfinished:  # the others are saved at the end of their epoch
                    loops[s].save_inside(part, members[s].data)
            if signal:
                screen.close()
                raise Interrupted(signal, stage, first.progress.step)
    _add_sums(loops, pending)
    for loop, part in zip(loops, unstack_tree(state, places)):
        loop.state = part
    seconds, signal, stopped = time.monotonic() - began, signal_received(), None
    for member, loop, n, start in zip(members, loops, done, began_at):
        share = (n - start) / member.data.num_steps
        rates = {
            'seconds': seconds,
            'histories_per_second': member.data.num_histories * share / seconds,
        }
        try:
            loop.end_epoch(rates, lambda: signal)
        except Interrupted as interrupted:
            stopped = interrupted
    screen.end(_line(members, seconds))
    if stopped is not None:
        raise stopped


def _add_sums(loops: Sequence[Loop], block: tuple[dict[str, Array], list[int]] | None) -> None:
    """Adds the sums of a block, [steps, S] each, to the members' epochs."""
    if block is None:
        return
    sums, counts = block
    arrays = {name: np.asarray(array) for name, array in sums.items()}
    for s, (loop, count) in enumerate(zip(loops, counts)):
        loop.add_sums({name: array[:, s] for name, array in arrays.items()}, count)


def _line(members: Sequence[Member], seconds: float) -> str:
    """An epoch of all members in one line: the mean of the validation metric, and its range."""
    loops = [member.loop for member in members]
    progress, stage = loops[0].progress, loops[0].log.stage
    values = [loop.last_value for loop in loops]
    best = sum(loop.progress.stale == 0 for loop in loops)
    ended = sum(loop.progress.finished for loop in loops)
    ranking = '' if progress.select_on == SELECT_ON else 'unmasked '
    spread = f'{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})'
    return (
        f'{stage} {progress.epoch}/{loops[0].limits.epochs}: {len(loops)} runs, validation '
        f'{ranking}NDCG@20 {spread}, best so far in {best} of {len(loops)}, {duration(seconds)}'
        + (f', {ended} ended' if ended else '')
    )


def stack_members(
    blocks: Sequence[Sequence[Batch]], numbers: Sequence[np.ndarray]
) -> list[MemberBatch]:
    """The blocks of S members as batches with an axis of members.

    Args:
      blocks: each member's batches of a block, of one shape; not all are empty. A member with fewer
        batches than another is not live in the last ones.
      numbers: `Member.numbers_N` of each.
    """
    numbers_SN = np.stack(numbers)
    filler = jax.tree.map(np.zeros_like, next(block[0] for block in blocks if block))
    batches = []
    for i in range(max(map(len, blocks))):
        parts = [block[i] if i < len(block) else filler for block in blocks]
        batch = jax.tree.map(lambda *fields: np.stack(fields), *parts)
        is_live_S = np.array([i < len(block) for block in blocks])
        batches.append(MemberBatch(batch, is_live_S, numbers_SN))
    return batches


@jax.jit
def stack_trees(trees: Sequence[Tree]) -> Tree:
    """Trees of one shape as one, with a leading axis of their places."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack_tree(tree: Tree, number: int) -> list[Tree]:
    """The trees in the places of a tree with a leading axis of so many places.

    Of a tree that several devices share they come to the first of them.
    """
    parts = _unstack(tree, number)
    if len(jax.tree.leaves(tree)[0].sharding.device_set) > 1:
        parts = jax.device_put(parts, jax.devices()[0])
    return list(parts)


def _split(tree: Tree, number: int) -> tuple[Tree, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return tuple(structure.unflatten([leaf[s] for leaf in leaves]) for s in range(number))


_unstack = jax.jit(_split, static_argnums=1)
