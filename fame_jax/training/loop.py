"""The training loop of a stage: epochs, validation, early stopping, checkpoints and resume.

fit            start or resume, then epochs until a limit is reached
Loop.start     the state of the newest checkpoint, or the first validation and checkpoint
Loop.epoch     blocks of steps; a checkpoint on a signal or when one is due
Loop.end_epoch validation, the best epoch's copy, log, checkpoint
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.batch import Batch
from fame_jax.errors import DivergedError, Interrupted, UserError
from fame_jax.parallel import processes
from fame_jax.screen import duration
from fame_jax.training.checkpoint import Checkpoints
from fame_jax.training.log import Log, summarise
from fame_jax.training.optimizer import averaged_params
from fame_jax.training.profile import Profile
from fame_jax.training.signals import catch_signals
from fame_jax.training.step import Program, State

Array = jax.Array
Tree = Any

SELECT_ON = 'ndcg@20'  # of the validation split, masked
SAVING_SHARE = 0.05  # of the time goes at most to saving checkpoints, but for the last one


class Epoch(NamedTuple):
    """One epoch's batches.

    Fields:
      batches: an iterator with get_state and set_state.
      num_steps: its number of batches.
      num_histories: the histories (windows) in it.
    """

    batches: Iterator[Batch]
    num_steps: int
    num_histories: int


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds apart from arrays, as JSON."""

    epoch: int = 0  # finished epochs
    step: int = 0
    data: dict | None = None  # Grain's state inside an epoch; None between epochs
    loss_sum: float = 0.0  # of the current epoch
    loss_count: float = 0.0
    metric_sums: dict = dataclasses.field(default_factory=dict)  # over the current epoch's steps
    best_value: float = -1.0
    best_epoch: int = 0
    stale: int = 0  # epochs since the best one
    seconds: float = 0.0  # of training and validation, over all attempts
    finished: bool = False
    data_sha256: str = ''
    machine: dict = dataclasses.field(default_factory=dict)  # on which the stage began
    key: list[int] = dataclasses.field(default_factory=list)
    select_on: str = SELECT_ON  # the metric by which the best epoch is selected


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a stage ends, and how often it is saved.

    Fields:
      epochs: the most epochs.
      patience: epochs without a better validation score after which the stage ends.
      checkpoint_seconds: the least time between two checkpoints, but for the first and the last.
        Unless it is 0, the time is also so long that saving takes no more than `SAVING_SHARE`.
    """

    epochs: int
    patience: int
    checkpoint_seconds: float = 0.0


def fit(
    *,
    state: State,
    program: Program,
    key: Array,
    epochs: Callable[[int], Epoch],
    before_epoch: Callable[[Tree, int], Tree],
    validate: Callable[[Tree], dict[str, float]],
    limits: Limits,
    checkpoints: Checkpoints,
    log: Log,
    profile: Profile,
    data_sha256: str,
    machine: dict[str, Any],
    select_on: str = SELECT_ON,
    until: int | None = None,
) -> tuple[Tree, Progress]:
    """Trains one stage until a limit is reached, from its newest checkpoint if there is one.

    Args:
      state: the state before the first step; donated.
      program: blocks of steps.
      key: the stage's key; a checkpoint's key takes its place.
      epochs: epoch number, from 0 -> its batches.
      before_epoch: (params, epoch) -> params, before the epoch's first step, for parameters that no
        gradient changes.
      validate: params -> metrics, `select_on` among them.
      limits: when the stage ends.
      checkpoints: the stage's checkpoints.
      log: where progress is written.
      profile: traces some dispatches.
      data_sha256: checksum of the data set, kept in the checkpoint.
      machine: what the stage runs on, kept in the checkpoint.
      select_on: the validation metric of the best epoch; a checkpoint's takes its place.
      until: stops after this epoch and saves, so that a later call goes on; None: at a limit.

    Returns:
      The parameters of the best epoch by `select_on`, and the stage's progress.

    Raises:
      Interrupted: after SIGTERM or SIGINT; the state is saved.
      UserError: when the loss or a score is not finite.
    """
    loop = Loop(program, validate, limits, checkpoints, log, profile)
    loop.start(state, key, data_sha256, machine, select_on)
    with catch_signals() as signal_received:
        while loop.goes_on(until):
            data = loop.open_epoch(epochs, before_epoch)
            rates = loop.epoch(data, signal_received)
            loop.end_epoch(rates, signal_received)
    loop.save_new()
    return loop.best, loop.progress


class Loop:
    """A stage's state while it trains: arrays, progress, and what it is trained with."""

    def __init__(
        self,
        program: Program,
        validate: Callable[[Tree], dict[str, float]],
        limits: Limits,
        checkpoints: Checkpoints,
        log: Log,
        profile: Profile,
    ):
        """Trains nothing yet."""
        self.program = program
        self.validate = validate
        self.limits = limits
        self.checkpoints = checkpoints
        self.log = log
        self.profile = profile
        self.progress = Progress()
        self.signal = 0  # the number of the signal that has come
        self.last_value = -1.0  # of the newest epoch's validation, by which the best is selected
        self.saving_together = 1  # loops that save at the same times as this one
        self._saving = 0.0  # seconds that the newest checkpoint took
        self._is_first = True  # the next block is the first, which waits for the compiler
        self.saved = self.clock = time.monotonic()

    def start(
        self,
        state: State,
        key: Array,
        data_sha256: str,
        machine: dict[str, Any],
        select_on: str = SELECT_ON,
    ) -> None:
        """Restores the newest checkpoint, or validates the initial parameters and saves them."""
        if self.checkpoints.last_step() is not None:
            self._restore(state, key)
            return
        self.state, self.key, self.best = state, key, copy(state.params)
        self.progress = Progress(
            data_sha256=data_sha256,
            machine=machine,
            key=np.asarray(jax.random.key_data(key)).tolist(),
            select_on=select_on,
        )
        self.log.drop_after(-1)
        values = self._validate()
        self.progress.best_value = values[select_on]
        self.log.values('validation', 0, 0, values)
        self.log.say(f'before the first step, validation {summarise(values, select_on)}')
        self.progress.finished = self.limits.epochs == 0
        self.save()

    def _restore(self, state: State, key: Array) -> None:
        self.progress = read_progress(self.checkpoints)
        params = state.params
        with self._waiting('reading the checkpoint'):
            trees = self.checkpoints.restore(params=params, optimizer=state.optimizer, best=params)
        step = jax.device_put(np.int32(self.progress.step), state.step.sharding)
        self.state = State(step, trees['params'], trees['optimizer'])
        self.best = trees['best']
        before = self.progress.finished
        self.progress.finished = is_finished(dataclasses.asdict(self.progress), self.limits)
        if before and not self.progress.finished:  # the limits have grown
            self.log.say(f'goes on after epoch {self.progress.epoch}')
        elif not before:
            self.log.say(f'resumes at epoch {self.progress.epoch + 1}, step {self.progress.step}')
        self.key = jax.random.wrap_key_data(
            jnp.asarray(self.progress.key, jnp.uint32), impl=jax.random.key_impl(key)
        )
        self.log.drop_after(self.progress.epoch)

    def open_epoch(
        self, epochs: Callable[[int], Epoch], before_epoch: Callable[[Tree, int], Tree]
    ) -> Epoch:
        """The epoch that comes next, its iterator where training goes on; arguments as `fit`'s."""
        self.clock = time.monotonic()
        data = epochs(self.progress.epoch)
        if self.progress.data is not None:
            data.batches.set_state(self.progress.data)
        else:
            params = before_epoch(self.state.params, self.progress.epoch)
            self.state = self.state._replace(params=params)
        return data

    def epoch(self, data: Epoch, signal_received: Callable[[], int]) -> dict[str, float]:
        """Takes the epoch's remaining steps, a block at a time.

        Args:
          data: the epoch; its iterator stands where training goes on.
          signal_received: the signal that has come, or 0.

        Returns:
          'seconds' and 'histories_per_second' of these steps.
        """
        progress, screen = self.progress, self.log.screen
        done = first = progress.data['next_index'] if progress.data else 0
        screen.begin(self.log.stage, progress.epoch, self.limits.epochs, data.num_steps, done)
        began, pending = time.monotonic(), None
        while block := list(itertools.islice(data.batches, self.program.size)):
            compiling = self._waiting('compiling') if self._is_first else contextlib.nullcontext()
            with compiling, self.profile.dispatch(self.log.stage) as result:
                self.state, sums = self.program(self.state, block, self.key)
                result.append(sums)
            self._is_first = False
            progress.step += len(block)
            done += len(block)
            # The device works on this block while the host reads the sums of the one before.
            self._add(pending)
            pending = sums, len(block)
            speed = (done - first) / (time.monotonic() - began)
            values = self._bar_values(data, done, speed) if screen.mode == 'bar' else {}
            screen.steps(len(block), **values)
            self.signal = signal_received()
            # After the last step comes the epoch's own checkpoint; one step has one checkpoint.
            if done < data.num_steps and (self.signal or self.checkpoint_due()):
                self._add(pending)
                pending = None
                self.save_inside(self.state, data)
                if self.signal:
                    screen.close()
                    raise Interrupted(self.signal, self.log.stage, progress.step)
        self._add(pending)
        self.profile.close()
        seconds = time.monotonic() - began
        share = (done - first) / data.num_steps
        return {
            'seconds': seconds,
            'histories_per_second': data.num_histories * share / seconds,
        }

    def end_epoch(self, rates: dict[str, float], signal_received: Callable[[], int]) -> None:
        """Validates, keeps the best epoch's parameters, logs and saves.

        Args:
          rates: seconds and speed of the epoch's steps.
          signal_received: the signal that has come, or 0.
        """
        progress = self.progress
        values = self._validate()
        self.last_value = values[progress.select_on]
        progress.epoch += 1
        progress.stale += 1
        if values[progress.select_on] > progress.best_value:
            progress.best_value = values[progress.select_on]
            progress.best_epoch = progress.epoch
            progress.stale = 0
            self.best = copy(self.weights())
        steps = max(progress.metric_sums.pop('steps', 0), 1)
        train = {
            'loss': progress.loss_sum / max(progress.loss_count, 1),
            **{name: total / steps for name, total in progress.metric_sums.items()},
            **rates,
            'compile_seconds': self.program.pop_compile_seconds(),
        }
        self.log.values('train', progress.step, progress.epoch, train)
        self.log.values('validation', progress.step, progress.epoch, values)
        self._add_seconds()
        progress.data, progress.metric_sums = None, {}
        progress.loss_sum, progress.loss_count = 0.0, 0.0
        progress.finished = (
            progress.stale >= self.limits.patience or progress.epoch >= self.limits.epochs
        )
        if not self.signal and jax.process_count() == 1:
            self.signal = signal_received()
        due = processes.agree(self._is_due())
        if progress.finished or self.signal or due:
            self.save()
        self.log.epoch_end(
            progress.epoch,
            self.limits.epochs,
            train,
            summarise(values, progress.select_on),
            best=progress.stale == 0,
        )
        if self.signal:
            raise Interrupted(self.signal, self.log.stage, progress.step)

    def goes_on(self, until: int | None = None) -> bool:
        """Whether another epoch comes, of those up to `until`."""
        return not self.progress.finished and (until is None or self.progress.epoch < until)

    def weights(self) -> Tree:
        """The parameters that are validated and kept: their average where there is one."""
        return averaged_params(self.state.params, self.state.optimizer)

    def save(self) -> None:
        """Writes a checkpoint."""
        began = time.monotonic()
        with self._waiting('saving a checkpoint'):
            self.checkpoints.save(
                self.progress.step,
                self.state.params,
                self.state.optimizer,
                self.best,
                dataclasses.asdict(self.progress),
            )
        self.saved = time.monotonic()
        self._saving = self.saved - began

    def save_new(self) -> None:
        """Writes a checkpoint unless the newest one is of this step."""
        if self.checkpoints.last_step() != self.progress.step:
            self.save()

    def save_inside(self, state: State, data: Epoch) -> None:
        """Writes a checkpoint inside an epoch, of the state after its last step."""
        self.state = state
        self.progress.data = data.batches.get_state()
        self._add_seconds()
        self.save()

    def _add_seconds(self) -> None:
        """Adds the time since the last call, or since the epoch began, to the stage's."""
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now

    def checkpoint_due(self) -> bool:
        """Inside an epoch; several processes, which would have to agree, save between epochs."""
        if jax.process_count() > 1:
            return False
        return self._is_due()

    def _is_due(self) -> bool:
        least = self.limits.checkpoint_seconds
        if least:
            least = max(least, self._saving * self.saving_together / SAVING_SHARE)
        return time.monotonic() - self.saved >= least

    def _validate(self) -> dict[str, float]:
        doing = 'compiling, validating' if self._is_first else 'validating'
        try:
            with self._waiting(doing):
                return self.validate(self.weights())
        except FloatingPointError as error:
            raise self._diverged(f'a score is NaN after step {self.progress.step}') from error

    def _waiting(self, doing: str) -> contextlib.AbstractContextManager:
        return self.log.screen.waiting(f'{self.log.stage}: {doing}')

    def _diverged(self, reason: str) -> DivergedError:
        return DivergedError(
            f'{self.log.stage}: {reason}; lower the learning rate and use another --workdir'
        )

    def _add(self, block: tuple[dict[str, Array], int] | None) -> None:
        """Adds the sums of a block's steps to the epoch's."""
        if block is not None:
            self.add_sums(*block)

    def add_sums(self, sums: Mapping[str, Array], steps: int) -> None:
        """Adds the sums of the first so many steps of a block to the epoch's.

        Raises:
          UserError: when a loss is not finite.
        """
        values = {name: np.asarray(array)[:steps].tolist() for name, array in sums.items()}
        progress = self.progress
        for total, weight in zip(values.pop('loss'), values.pop('weight')):
            if not np.isfinite(total):
                raise self._diverged(f'the loss is {total} at or before step {progress.step}')
            progress.loss_sum += total
            progress.loss_count += weight
        for name, of_step in values.items():
            progress.metric_sums[name] = progress.metric_sums.get(name, 0.0) + sum(of_step)
        if values:
            progress.metric_sums['steps'] = progress.metric_sums.get('steps', 0) + steps

    def _bar_values(self, data: Epoch, done: int, speed: float) -> dict[str, str]:
        """Values after the progress bar; `speed` is steps per second."""
        progress = self.progress
        left = (self.limits.epochs - progress.epoch) * data.num_steps - done
        return {
            'loss': f'{progress.loss_sum / max(progress.loss_count, 1):.3f}',
            'best NDCG@20': f'{progress.best_value:.4f}',
            'histories/s': f'{speed * data.num_histories / max(data.num_steps, 1):,.0f}',
            'at most': duration(left / speed),
        }


def read_progress(checkpoints: Checkpoints) -> Progress:
    """The progress of the newest checkpoint; a fresh one if there is no checkpoint.

    Raises:
      UserError: when another version of this program wrote it.
    """
    stored = check_progress(checkpoints)
    if stored.keys() - {field.name for field in dataclasses.fields(Progress)}:
        raise UserError(
            f'{checkpoints.folder} was written by another version of fame_jax; go on with that '
            'version, or choose another --workdir'
        )
    return Progress(**stored)


def check_progress(checkpoints: Checkpoints) -> dict[str, Any]:
    """The progress of the newest checkpoint as it is stored; {} if there is no checkpoint.

    Raises:
      UserError: when a value is missing or has another type than in `Progress`.
    """
    stored = checkpoints.progress()
    if not stored:
        return {}
    defaults = dataclasses.asdict(Progress())
    # Runs of version 0.1 have neither of these.
    stored = {'metric_sums': {}, 'machine': {}} | stored
    for name, default in defaults.items():
        value = stored.get(name)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not (isinstance(value, kinds) or (name == 'data' and isinstance(value, dict))):
            raise UserError(
                f'{checkpoints.folder}: the newest checkpoint is damaged ({name} is '
                f'{ascii(value)[:40]}); remove it and run its stage again'
            )
    return stored


def is_finished(progress: Mapping[str, Any], limits: Limits) -> bool:
    """Whether a stage ended before, and would not go on under these limits.

    Args:
      progress: of the stage's newest checkpoint; empty if there is none.
      limits: larger ones than the stage ended by make it go on.
    """
    ended = progress.get('finished') and (
        progress['stale'] >= limits.patience or progress['epoch'] >= limits.epochs
    )
    return bool(ended)


@jax.jit  # one program for the tree; by itself `jnp.copy` compiles one for each shape
def copy(tree: Tree) -> Tree:
    """A copy of the arrays; donating the originals leaves it unchanged."""
    return jax.tree.map(jnp.copy, tree)
