"""The stages pretrain and finetune: settings and data to training.loop.fit."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fame_jax import losses, machine
from fame_jax.batch import Batch
from fame_jax.data import epochs, windows
from fame_jax.data.card import REPEATS_SAID
from fame_jax.errors import UserError
from fame_jax.evaluation.metrics import log_name
from fame_jax.models import options as model_options
from fame_jax.models import text_path
from fame_jax.models.item_model import ItemModel
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.parallel import processes
from fame_jax.screen import Screen, duration
from fame_jax.stages import initialize, model_source, update_start
from fame_jax.stages.context import TRAINED, RunContext, abstract_params
from fame_jax.training import loop
from fame_jax.training.checkpoint import Checkpoints
from fame_jax.training.log import open_log
from fame_jax.training.optimizer import carry_state, make_optimizer, make_schedule
from fame_jax.training.prefetch import Prefetch
from fame_jax.training.profile import Profile
from fame_jax.training.step import (
    Program,
    State,
    Step,
    abstract_state,
    init_state,
    make_step,
    take_step,
)

Array = jax.Array
Tree = Any


def pretrain(context: RunContext) -> None:
    """Trains the backbone, or a model that has none."""
    train(context, 'pretrain')


def finetune(context: RunContext) -> None:
    """Trains FAME end to end, from its backbone through surgery or from scratch."""
    train(context, 'finetune')


def train(context: RunContext, stage: str, until: int | None = None) -> None:
    """Trains a stage, from its checkpoint if there is one, at most to the end of an epoch.

    A finished stage is skipped, unless it has been given more epochs.
    """
    screen = context.screen
    with open_checkpoints(context, stage, screen) as checkpoints:
        if checkpoints is None:
            return
        with screen.waiting(f'{stage}: tracing the programs'):
            precompile(context, stage)
        with (
            open_stage(context, stage, checkpoints, screen) as opened,
            contextlib.closing(Profile(context.config.devices.profile)) as profile,
        ):
            _, progress = loop.fit(
                **opened.start,
                epochs=opened.setup.epochs,
                before_epoch=opened.before_epoch,
                **opened.parts,
                program=opened.setup.program,
                profile=profile,
                until=until,
            )
    screen.say(f'{stage}: {describe_end(progress)}')


@contextlib.contextmanager
def open_checkpoints(
    context: RunContext, stage: str, screen: Screen
) -> Iterator[Checkpoints | None]:
    """The checkpoints of a stage that is to be trained; None where it is finished.

    Raises:
      UserError: when the folder holds another run, or the backbone is missing or does not fit.
    """
    _ = context.data  # refused here where there are none, before anything is written
    context.begin_writing()
    context.say_split()
    with context.checkpoints(stage) as checkpoints:
        if processes.is_chief():  # of several processes
            checkpoints.tidy()
        processes.barrier(stage)
        model_source.check_source(context)
        if loop.is_finished(loop.check_progress(checkpoints), context.limits(stage)):
            screen.say(f'{stage}: finished before')
            yield None
            return
        from_backbone = stage == 'finetune' and not context.config.update.append
        if checkpoints.last_step() is None and from_backbone:
            initialize.check_backbone(context)  # before the programs are compiled
        yield checkpoints


class Opened(NamedTuple):
    """A stage that is about to train.

    Fields:
      setup: what it trains with.
      start: arguments of `loop.Loop.start`: the initial state and what its checkpoints keep.
      parts: arguments of `loop.Loop` apart from the program and the profile.
      before_epoch: the model's own update before an epoch.
    """

    setup: 'Setup'
    start: dict[str, Any]
    parts: dict[str, Any]
    before_epoch: Callable[[Tree, int], Tree]


@contextlib.contextmanager
def open_stage(
    context: RunContext, stage: str, checkpoints: Checkpoints, screen: Screen
) -> Iterator[Opened]:
    """Makes a stage's initial state and opens its log.

    Args:
      context: the run.
      stage: 'pretrain' or 'finetune'.
      checkpoints: the stage's.
      screen: where the stage's log prints.
    """
    setup, fresh = make_setup(context, stage), checkpoints.last_step() is None
    with screen.waiting(f'{stage}: initial parameters, compiling'):
        state = _initial_state(context, stage, setup, fresh)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    screen.say(f'{stage}: {context.label(stage)}, {count:,} parameters')
    protocol = 'masked' if context.selects_masked else 'unmasked'
    _say_repeats(context, stage, protocol, screen)
    if context.selection_users is not None:
        screen.say(f'{stage}: validation on {context.describe_selection()}')
    chief, track = processes.is_chief(), context.config.run.track
    settings = context.config.flat()
    with open_log(stage, context.folder, context.metrics, screen, chief, track, settings) as log:
        yield Opened(
            setup,
            start={
                'state': state,
                'key': jax.random.fold_in(setup.key, 1),
                'data_sha256': context.data.card['fingerprint'],
                'machine': machine.describe(),
                'select_on': log_name(loop.SELECT_ON, protocol),
            },
            parts={
                'validate': lambda params: context.ranker(stage).metrics(
                    context.fold(params, context.mesh), 'selection'
                ),
                'limits': context.limits(stage),
                'checkpoints': checkpoints,
                'log': log,
            },
            before_epoch=_before_epoch(context, stage, setup),
        )


def _initial_state(context: RunContext, stage: str, setup: 'Setup', fresh: bool) -> State:
    """The state before the first step; of a stage that resumes, any state of its shapes."""
    if fresh and context.config.update.append:
        return _continue_run(context, stage, setup)
    if fresh:
        params = initialize.draw_params(context, stage, setup.module, setup.key)
        start = initialize.initialize(context, stage, params, setup.key)
        params = mesh_lib.device_put(start, context.mesh)
    else:
        params = initialize.make_zeros(setup.module, context.mesh)
    return init_state(params, setup.optimizer, context.mesh)


def _continue_run(context: RunContext, stage: str, setup: 'Setup') -> State:
    """The state of an update: best parameters and optimizer of its run, with rows for new items."""
    with update_start.open_run_before(context) as before:
        module = before.module(stage)
        optimizer = _make_optimizer(before, stage, module, num_steps=1)
        params = abstract_params(module)
        state = abstract_state(params, optimizer, None)
        with before.checkpoints(stage) as checkpoints:
            trees = checkpoints.restore(best=params, optimizer=state.optimizer)
        fresh = initialize.draw_grown_params(setup.module, params, setup.key)
        grown = update_start.grow(context, before, make_windows(context), trees['best'], fresh)
    grown = mesh_lib.device_put(jax.tree.map(jnp.asarray, grown), context.mesh)
    state = init_state(grown, setup.optimizer, context.mesh)
    return state._replace(optimizer=carry_state(trees['optimizer'], state.optimizer))


def describe_end(progress: loop.Progress) -> str:
    """The best epoch of a stage that has ended, its validation metric and the time, in words."""
    best = f'best epoch {progress.best_epoch} of {progress.epoch}'
    if not progress.best_epoch:
        best = f'no better than before training, in {progress.epoch} epochs'
    ranking = 'unmasked ' if progress.select_on != loop.SELECT_ON else ''
    return (
        f'{best}, validation {ranking}NDCG@20 {progress.best_value:.4f}, '
        f'{duration(progress.seconds)}'
    )


def _say_repeats(context: RunContext, stage: str, protocol: str, screen: Screen) -> None:
    """Says by which ranking the best epoch is selected, where the two rankings differ much."""
    share = context.repeats['validation']
    if share > REPEATS_SAID:
        screen.say(
            f'{stage}: {share:.0%} of the validation targets stand in the history of their user; '
            f'the best epoch is selected by the {protocol} ranking (--select_on)'
        )


class Setup(NamedTuple):
    """What a stage trains with, apart from its parameters."""

    module: ItemModel
    key: Array
    optimizer: optax.GradientTransformation
    step: Step
    program: Program
    epochs: Prefetch
    batch: Batch  # the first one, for the shapes


def make_setup(context: RunContext, stage: str) -> Setup:
    """The stage's setup; the same object each time, so that its program is compiled once."""
    if stage not in context.setups:
        config, mesh = context.config, context.mesh
        module = context.trained_module(stage, mesh)
        key = jax.random.fold_in(jax.random.key(config.run.seed), TRAINED.index(stage))
        make_epoch = make_epochs(context, module)
        prefetch = Prefetch(make_epoch)
        epoch = context.progress(stage).get('epoch', 0)
        batch, num_steps = prefetch.peek(epoch)
        steps_of_rates = num_steps
        if epoch and config.training.has_schedule:
            # Epochs differ in steps, and a resumed stage takes the rates of an uninterrupted one.
            steps_of_rates = make_epoch(0).num_steps
        optimizer = _make_optimizer(context, stage, module, steps_of_rates)
        if not config.training.has_schedule:  # which depends on the number of steps in an epoch
            optimizer = context.programs.setdefault(f'{stage}: optimizer', optimizer)
        step = make_step(_objective(context, stage, module), optimizer)
        # Prefixes come in batches of several shapes; the batches of a block have one.
        size = 1 if module.row_layout == 'prefixes' else config.training.steps_per_dispatch
        program = Program(step, min(size, num_steps), mesh, packs=_packs(context, module))
        if not config.training.has_schedule:
            program = context.programs.setdefault(stage, program)
        context.setups[stage] = Setup(module, key, optimizer, step, program, prefetch, batch)
    return context.setups[stage]


def precompile(context: RunContext, stage: str) -> None:
    """Traces the programs of this stage and of later ones, and has a thread compile them.

    Tracing happens here, so that an error in a model or a loss has a stack that leads to it. XLA
    compiles while the initial parameters are validated and while earlier stages train.
    """
    stages = [s for s in context.config.run.stages if s in TRAINED]
    for later in stages[stages.index(stage) :] if stage in stages else [stage]:
        if later in context.setups or (later != stage and context.is_finished(later)):
            continue
        setup = make_setup(context, later)
        params = abstract_params(setup.module)
        state = abstract_state(params, setup.optimizer, context.mesh)
        key = jax.random.fold_in(setup.key, 1)
        setup.program.precompile(state, setup.batch, key, context.executor)
        if later != stage:  # the first stage validates before it trains, in the main thread
            context.ranker(later).precompile('selection', context.executor)


def make_epochs(context: RunContext, module: ItemModel) -> Callable[[int], loop.Epoch]:
    """Epoch number -> the training batches in the model's row layout."""
    config, training_windows = context.config, make_windows(context)
    layout, training = module.row_layout, config.training
    # A prefix has a row of its own, at most as long as a history.
    row_length = config.data.max_length if layout == 'prefixes' else training.row_length
    rows = mesh_lib.process_rows(context.mesh, training.rows_per_step)
    choose = lambda epoch: training_windows  # noqa: E731
    if config.update.append:
        choose = update_start.windows_by_epoch(context, training_windows)

    def make_epoch(epoch: int) -> loop.Epoch:
        chosen = choose(epoch)
        batches, num_steps = epochs.epoch_batches(
            chosen,
            seed=config.run.seed,
            epoch=epoch,
            row_length=row_length,
            rows_per_step=training.rows_per_step,
            row_layout=layout,
            part=rows,
        )
        return loop.Epoch(batches, num_steps, len(chosen.starts))

    return make_epoch


def make_windows(context: RunContext) -> windows.Windows:
    """The windows of the training histories.

    Raises:
      UserError: when no history is long enough.
    """
    options, data = context.config.data, context.data
    cut = windows.make_windows(
        data.items, data.offsets, options.max_length, options.long_histories, data.split.train_ends
    )
    if not len(cut.starts):
        lack = 'no user has more than three items'
        if data.split.is_by_time:
            lack = f'no user has two items before {data.split.card["validation_moment"]}'
        raise UserError(
            f'{context.dataset_folder}: {lack}, so there is nothing to train on; use more data'
        )
    return cut


def _objective(context: RunContext, stage: str, module: ItemModel) -> Callable[..., Any]:
    """The model's objective, (params, batch, key) -> (loss sum, weight sum, metrics)."""
    of_model = jax.tree_util.Partial(module.objective, loss=_loss_options(context, stage))
    return _with_text_path(context, of_model, context.text_path)


def _with_text_path(
    context: RunContext, of_model: Callable[..., Any], constants: Any
) -> Callable[..., Any]:
    """The objective with --text_path, where there is one; `constants` are its arrays."""
    if not constants:
        return of_model
    return jax.tree_util.Partial(
        text_path.objective,
        of_model=of_model,
        constants=constants,
        share=context.config.text.text_path,
    )


def _loss_options(context: RunContext, stage: str) -> losses.LossOptions:
    """The loss over items of a stage."""
    loss = context.config.loss
    options = losses.LossOptions(
        loss.loss,
        loss.num_negatives,
        loss.negatives,
        loss.chunk_tokens,
        loss.chunk_items,
        loss.shares(stage),
        loss.seen_weight,
    )
    if loss.negatives == 'popularity':
        items, _ = context.data.training_histories()
        count_V = np.bincount(items, minlength=context.data.num_items + 1)
        popularity_V = jnp.asarray(losses.cumulative_counts(count_V))
        options = dataclasses.replace(options, popularity_V=popularity_V)
    return mesh_lib.device_put(options, context.mesh)


def numbers(context: RunContext, stage: str) -> dict[str, Any]:
    """The settings of a stage that can be traced, so that runs with other ones share its program.

    A setting that switches a term off, such as a weight of 0, is left out, since the program
    without that term is another one. Runs whose numbers have the same names, and the same number
    of shares in their labels, can have one program.

    Returns:
      Floats by name: 'rate', 'weight_decay', 'ema', 'seen_weight', and the options of the model
      that are marked `options.Traced`; and a tuple of floats, 'future_targets'.
    """
    training, loss, module = context.config.training, context.config.loss, context.module(stage)
    off = {'seen_weight': 1, 'future_targets': (1.0,), 'dropout': None, 'temperature': None}
    found = {
        'rate': training.rate(stage),
        'weight_decay': training.weight_decay,
        'ema': training.ema,
        'seen_weight': loss.seen_weight,
        'future_targets': loss.shares(stage),
    }
    for name, option in model_options.of(type(module)).items():
        if option.is_traced:
            found[name] = getattr(module, name)
    return {name: value for name, value in found.items() if value != off.get(name, 0)}


def step_of_numbers(context: RunContext, stage: str) -> Callable[..., tuple[State, dict]]:
    """The step (numbers, state, batch, key) -> (state, sums) of a stage.

    `numbers`, some or all of those of `numbers`, are traced; the others are those of the run.
    """
    module = context.trained_module(stage)

    def step(
        numbers: dict[str, Any],
        state: State,
        batch: Batch,
        key: Array,
        *,
        loss: losses.LossOptions,
        constants: Any,
    ) -> tuple[State, dict[str, Array]]:
        of_loss = {
            n: value for n, value in numbers.items() if n in ('seen_weight', 'future_targets')
        }
        options = {n: value for n, value in numbers.items() if n in model_options.of(type(module))}
        loss = dataclasses.replace(loss, **of_loss)
        of_model = functools.partial(module.clone(**options).objective, loss=loss)
        objective = _with_text_path(context, of_model, constants)
        optimizer = _make_optimizer(context, stage, module, 1, numbers)
        return take_step(objective, state, batch, key, optimizer=optimizer)

    arrays = {'loss': _loss_options(context, stage), 'constants': context.text_path}
    return jax.tree_util.Partial(step, **arrays)


def _make_optimizer(
    context: RunContext,
    stage: str,
    module: ItemModel,
    num_steps: int,
    numbers: Mapping[str, Any] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """The optimizer of a stage; its schedule counts so many steps an epoch.

    `numbers` take the place of the run's own, where there are some.
    """
    training, text = context.config.training, context.config.text
    rate = training.rate(stage)
    trained_rows = {}
    if text.unseen_items == 'kept':
        seen_V = windows.items_in_windows(make_windows(context), context.data.num_items)
        rows = mesh_lib.table_rows(context.data.num_items, context.mesh)
        trained_rows = {'item_table': np.pad(seen_V, (0, rows - len(seen_V)))}
    rate = make_schedule(
        numbers.get('rate', rate),
        training.schedule,
        round(training.warmup_epochs * num_steps),
        num_steps * context.limits(stage).epochs,
    )
    return make_optimizer(
        rate,
        numbers.get('weight_decay', training.weight_decay),
        ema=numbers.get('ema', training.ema),
        frozen=module.frozen_params,
        trained_rows=trained_rows,
    )


def _packs(context: RunContext, module: ItemModel) -> bool:
    """Whether small parameters are one array in the program of the steps.

    They are on a GPU, where starting a kernel takes longer than updating a small array, unless a
    mesh places the parameters or the optimizer does not treat all of them alike.
    """
    is_plain = not module.frozen_params and context.config.text.unseen_items != 'kept'
    return jax.default_backend() == 'gpu' and context.mesh is None and is_plain


def _before_epoch(context: RunContext, stage: str, setup: Setup) -> Callable[[Tree, int], Tree]:
    """(params, epoch) -> params: the model's own update before an epoch, such as clustering."""
    module = setup.module
    if module.before_epoch is None:
        return lambda params, epoch: params
    key, make_epoch = jax.random.fold_in(setup.key, 3), make_epochs(context, module)

    def before_epoch(params: Tree, epoch: int) -> Tree:
        epoch_key = jax.random.fold_in(key, epoch)
        read = context.fold(params, context.mesh)
        moved = module.before_epoch(read, make_epoch(epoch).batches, epoch_key)
        own = ('item_table', text_path.NAME) * bool(context.text_path)  # not those of the fold
        return {**moved, **{name: params[name] for name in own}}

    return before_epoch
