"""The one loop, for every model and stage."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import sharding
from fame_jax.batch import Batch
from fame_jax.checkpoint import Checkpoints
from fame_jax.errors import UserError
from fame_jax.profile import Profile
from fame_jax.programs import Program, State
from fame_jax.records import Metrics
from fame_jax.screen import Screen, duration

Array = jax.Array
Tree = Any

SELECT_ON = 'ndcg@20'  # of validation, masked, over all users


class Epoch(NamedTuple):
    """One epoch's batches: an iterator with get_state and set_state, and its extent."""

    batches: Iterator[Batch]
    num_steps: int
    num_histories: int


@dataclasses.dataclass
class Progress:
    """Where a stage stands: what a checkpoint holds beside arrays; JSON."""

    epoch: int = 0
    step: int = 0
    data: dict | None = None  # Grain's state inside the epoch
    loss_sum: float = 0.0  # of the epoch so far
    loss_count: float = 0.0
    best_value: float = -1.0
    best_epoch: int = 0
    stale: int = 0  # epochs since the best
    seconds: float = 0.0  # of training and validation, over all attempts
    finished: bool = False
    data_sha256: str = ''
    machine: dict = dataclasses.field(default_factory=dict)  # that it began on
    key: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a stage ends, and how often it is saved."""

    epochs: int
    patience: int
    checkpoint_every: int = 0  # steps; 0: at an epoch's end alone
    checkpoint_seconds: float = 0.0  # an epoch that ends sooner after a checkpoint leaves none


class Interrupted(Exception):
    """A signal came; the state is saved."""

    def __init__(self, number: int, stage: str, step: int):
        super().__init__(f'{signal.Signals(number).name} in {stage}: saved at step {step}')
        self.number = number


def fit(
    *,
    stage: str,
    state: State,
    program: Program,
    key: Array,
    epoch_of: Callable[[int], Epoch],
    refresh: Callable[[Tree, int], Tree],
    validate: Callable[[Tree], dict[str, float]],
    limits: Limits,
    checkpoints: Checkpoints,
    metrics: Metrics,
    screen: Screen,
    scalars: Callable[[str, int, dict[str, float]], None],
    data_sha256: str,
    machine: dict[str, Any],
    profile: Profile,
) -> tuple[Tree, Progress]:
    """Trains one stage to its end, from its checkpoint if there is one.

    `refresh`, (params, epoch) -> params, comes before an epoch's first step, for what no gradient
    moves; a run that goes on inside an epoch has it in its checkpoint.

    Returns:
      The parameters of the best epoch by validation NDCG@20, and the stage's progress.

    Raises:
      Interrupted: after SIGTERM or SIGINT; everything is saved.
      UserError: when the loss or a score is no number.
    """
    # 1. Start: from the stage's own checkpoint, or from the state given.
    progress, params = read_progress(checkpoints), state.params
    if checkpoints.last_step() is not None:
        found = checkpoints.restore(params=params, optimizer=state.optimizer, best=params)
        step = jax.device_put(np.int32(progress.step), state.step.sharding)
        state = State(step, found['params'], found['optimizer'])
        best = found['best']
        key = jax.random.wrap_key_data(
            jnp.asarray(progress.key, jnp.uint32), impl=jax.random.key_impl(key)
        )
        if not progress.finished:
            screen.say(f'{stage}: goes on at epoch {progress.epoch + 1}, step {progress.step}')
        metrics.keep(lambda line: line.get('stage') != stage or line['epoch'] <= progress.epoch)
    else:
        best = copy(params)
        progress.data_sha256, progress.machine = data_sha256, machine
        progress.key = np.asarray(jax.random.key_data(key)).tolist()
        metrics.keep(lambda line: line.get('stage') != stage)
        with ahead(program, state, epoch_of, key):
            values = judge(validate, params, progress, stage)
        progress.best_value = values[SELECT_ON]
        metrics.append(stage=stage, step=0, epoch=0, split='validation', **values)
        screen.say(f'{stage}: before the first step, validation {tell(values)}')
        progress.finished = limits.epochs == 0

    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        checkpoints.save(
            progress.step, state.params, state.optimizer, best, dataclasses.asdict(progress)
        )
        saved = time.monotonic()

    if checkpoints.last_step() is None:
        save()

    # 2. Epochs, a block of steps at a time.
    with listening() as told:
        while not progress.finished:
            started = time.monotonic()
            data = epoch_of(progress.epoch)
            if progress.data is not None:
                data.batches.set_state(progress.data)
            else:
                state = state._replace(params=refresh(state.params, progress.epoch))
            done = progress.data['next_index'] if progress.data else 0
            screen.begin(stage, progress.epoch, limits.epochs, data.num_steps, done)
            began, start = time.monotonic(), done
            pending, heard = None, 0
            while block := list(itertools.islice(data.batches, until_save(done, program, limits))):
                with profile.dispatch(stage) as result:
                    state, sums = program(state, block, key)
                    result.append(sums)
                progress.step += len(block)
                done += len(block)
                # The device works on this block while the sums of the one before are read.
                add_loss(progress, pending, stage)
                pending = sums, len(block)
                speed = (done - start) / (time.monotonic() - began)
                if screen.mode == 'bar':
                    screen.steps(len(block), **bar_values(progress, speed, data, limits, done))
                due = limits.checkpoint_every and done % limits.checkpoint_every == 0
                heard = told()
                # A save at the last step is the epoch's end's; one step has one checkpoint.
                if (heard or due) and done < data.num_steps:
                    add_loss(progress, pending, stage)
                    pending = None
                    progress.data = data.batches.get_state()
                    progress.seconds += time.monotonic() - started
                    save()
                    progress.seconds -= time.monotonic() - started
                    if heard:
                        screen.close()
                        raise Interrupted(heard, stage, progress.step)
            add_loss(progress, pending, stage)
            profile.close()
            seconds = time.monotonic() - began

            # 3. Judge, keep the best, and save.
            values = judge(validate, state.params, progress, stage)
            progress.epoch += 1
            progress.stale += 1
            if values[SELECT_ON] > progress.best_value:
                progress.best_value, progress.best_epoch = values[SELECT_ON], progress.epoch
                progress.stale = 0
                best = copy(state.params)
            loss = progress.loss_sum / max(progress.loss_count, 1)
            rate = data.num_histories * (done - start) / data.num_steps / seconds
            compiling = program.compiling()
            at = {'stage': stage, 'step': progress.step, 'epoch': progress.epoch}
            metrics.append(
                **at,
                split='train',
                loss=loss,
                seconds=seconds,
                histories_per_second=rate,
                compile_seconds=compiling,
            )
            metrics.append(**at, split='validation', **values)
            scalars(stage, progress.step, {'train/loss': loss, 'train/histories_per_second': rate})
            scalars(stage, progress.step, {f'validation/{k}': v for k, v in values.items()})
            progress.seconds += time.monotonic() - started
            progress.data, progress.loss_sum, progress.loss_count = None, 0.0, 0.0
            progress.finished = progress.stale >= limits.patience or progress.epoch >= limits.epochs
            heard = heard or (told() if jax.process_count() == 1 else 0)
            due = sharding.agreed(time.monotonic() - saved >= limits.checkpoint_seconds)
            if progress.finished or heard or due:
                save()
            best_so_far = ' (best)' if progress.stale == 0 else ''
            compiled = f', compiling {duration(compiling)}' if compiling else ''
            screen.end(
                f'{stage} {progress.epoch}/{limits.epochs}: loss {loss:.4f}, validation '
                f'{tell(values)}{best_so_far}, {rate:,.0f} histories/s, {duration(seconds)}'
                f'{compiled}'
            )
            if heard:
                raise Interrupted(heard, stage, progress.step)
    return best, progress


@contextlib.contextmanager
def ahead(
    program: Program, state: State, epoch_of: Callable[[int], Epoch], key: Array
) -> Iterator[None]:
    """Compiles the step in a thread of its own, beside what is compiled and done meanwhile."""

    def compile_first() -> None:
        program.compile(state, next(epoch_of(0).batches), key)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(compile_first)
        yield
        future.result()


def read_progress(checkpoints: Checkpoints) -> Progress:
    """Where the newest checkpoint stands; a fresh Progress if there is none.

    Raises:
      UserError: when it was written by another version of this program.
    """
    found = checkpoints.progress()
    if found and found.keys() != {field.name for field in dataclasses.fields(Progress)}:
        raise UserError(
            f'{checkpoints.folder} was written by another version of fame_jax; run it with that '
            'version, or choose another --workdir'
        )
    return Progress(**found)


def judge(
    validate: Callable[[Tree], dict[str, float]], params: Tree, progress: Progress, stage: str
) -> dict[str, float]:
    """Validation; parameters that have become no numbers are told like such a loss."""
    try:
        return validate(params)
    except FloatingPointError as error:
        raise UserError(_diverged(f'a score is NaN after step {progress.step}', stage)) from error


def _diverged(what: str, stage: str) -> str:
    return f'{stage}: {what}; lower the learning rate and run in another --workdir'


def add_loss(progress: Progress, told: tuple[Array, int] | None, stage: str) -> None:
    """Adds the sums of a block's steps to the epoch's, and stops on a loss that is no number."""
    if told is None:
        return
    sums, steps = told
    for total, count in np.asarray(sums)[:steps].tolist():
        if not np.isfinite(total):
            what = f'the loss is {total} at or before step {progress.step}'
            raise UserError(_diverged(what, stage))
        progress.loss_sum += total
        progress.loss_count += count


def until_save(done: int, program: Program, limits: Limits) -> int:
    """Steps of the next block: as many as a dispatch takes, up to the next checkpoint."""
    if not limits.checkpoint_every:
        return program.size
    return min(program.size, limits.checkpoint_every - done % limits.checkpoint_every)


def bar_values(
    progress: Progress, steps_per_second: float, data: Epoch, limits: Limits, done: int
) -> dict[str, str]:
    """What stands behind the bar: loss, best validation, speed, and the longest it can take."""
    rate = steps_per_second * data.num_histories / max(data.num_steps, 1)
    left = (limits.epochs - progress.epoch) * data.num_steps - done
    return {
        'loss': f'{progress.loss_sum / max(progress.loss_count, 1):.3f}',
        'best': f'{progress.best_value:.4f}',
        'histories/s': f'{rate:,.0f}',
        'at most': duration(left / steps_per_second),
    }


def tell(values: dict[str, float]) -> str:
    """Validation in one phrase."""
    return f'NDCG@20 {values["ndcg@20"]:.4f} HR@10 {values["hr@10"]:.4f}'


def copy(tree: Tree) -> Tree:
    """Arrays of their own, which the donation of the originals leaves alone."""
    return jax.tree.map(jnp.copy, tree)


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Hears SIGTERM and SIGINT instead of dying of them: a function tells which came, or 0.

    A second one kills. Several processes are told at the same call, whichever of them was sent one.
    """
    together = jax.process_count() > 1
    heard: list[int] = []
    calls = itertools.count()

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        signal.signal(number, signal.SIG_DFL)

    def hear_together(number: int, frame: Any) -> None:
        # JAX listens to SIGTERM, and lets the other processes know.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    def told() -> int:
        return heard[0] if heard else 0

    def told_together() -> int:
        return signal.SIGTERM if sharding.is_preempted(next(calls)) else 0

    numbers = (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT)
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: nobody sends us signals
        before = {n: signal.signal(n, hear_together if together else hear) for n in numbers}
    try:
        yield told_together if together else told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
