"""The stages of a run, each from what the workdir holds to what it shall hold."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fame_jax import config as config_lib
from fame_jax import evaluate as judge
from fame_jax import item_table, losses, programs, records, serving, sharding, surgery, train
from fame_jax.batch import Batch
from fame_jax.config import Config
from fame_jax.data import epochs, pipeline, sequences
from fame_jax.data.prepare import prepare as prepare_data
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models.build import (
    MODELS,
    build_objective,
    build_plan,
    initial,
)
from fame_jax.profile import Profile
from fame_jax.report import report
from fame_jax.results import evaluate
from fame_jax.run import TRAINED, Run, abstract, label, machine
from fame_jax.screen import duration
from fame_jax.text import text

Array = jax.Array
Tree = Any


def prepare(run: Run) -> None:
    """Finds, filters and re-indexes the data set."""
    folder = run.folder / 'dataset'
    if run.prepared:
        run.screen.say(f'prepare: {folder} is there')
    elif sharding.is_chief():
        _prepare(run, folder)
    sharding.wait_for_all('prepare')


def _prepare(run: Run, folder: Path) -> None:
    began = time.monotonic()
    options = {name: getattr(run.config, name) for name in PREPARE_OPTIONS}
    data = prepare_data(run.config.dataset, seed=run.config.synthetic_seed, **options)
    run.remember()
    sequences.save(data, folder)
    run.screen.say(f'prepare: {sequences.describe(data)}')
    run.screen.say(f'prepare: {duration(time.monotonic() - began)}, in {folder}')


PREPARE_OPTIONS = (
    'data_dir',
    'user_column',
    'item_column',
    'time_column',
    'rating_column',
    'min_rating',
    'k_core',
    'synthetic_users',
    'synthetic_items',
    'synthetic_facets',
    'synthetic_values',
)


def pretrain(run: Run) -> None:
    """Trains the backbone, or a model that has none."""
    _train(run, 'pretrain', run.config.pretrain_epochs)


def finetune(run: Run) -> None:
    """Trains FAME end to end, from its backbone through surgery or from scratch."""
    _train(run, 'finetune', run.config.finetune_epochs)


class Plan(NamedTuple):
    """How a stage trains: all but its numbers."""

    module: Any
    key: Array
    optimizer: optax.GradientTransformation
    program: programs.Program
    first: Batch


def plan(run: Run, stage: str) -> Plan:
    """The stage's plan; the same one each time, so that its program is compiled once."""
    if stage not in run.plans:
        config, mesh = run.config, run.mesh
        module = run.module(stage, mesh)
        optimizer = _make_optimizer(run, stage, abstract(module))
        step = programs.make_step(_objective(run, stage, module), optimizer)
        epoch = epochs_of(run, stage)(0)
        # Batches of several shapes are several programs, and each block is of one.
        one_shape = MODELS[run.name(stage)].layout != 'prefixes'
        size = min(config.steps_per_dispatch, epoch.num_steps) if one_shape else 1
        program = programs.Program(step, size, mesh)
        run.plans[stage] = Plan(
            module, _key(config, stage), optimizer, program, next(epoch.batches)
        )
    return run.plans[stage]


def compile_ahead(run: Run) -> None:
    """Begins to compile what this stage and those to come will train with, beside all else.

    A stage that comes to its program before it is compiled waits for it, and tells its errors.
    """
    if run.plans:
        return
    for stage in run.config.stages:
        if stage in TRAINED and not run.is_finished(stage):
            this = plan(run, stage)
            state = programs.outline(abstract(this.module), this.optimizer, run.mesh)
            key = jax.random.fold_in(this.key, 1)
            run.ahead.submit(this.program.compile, state, this.first, key)
            if len(run.plans) > 1:  # the first stage validates before it trains, and at once
                run.ahead.submit(run.ranker(stage).compile, 'validation')


def _train(run: Run, stage: str, num_epochs: int) -> None:
    config, screen, mesh = run.config, run.screen, run.mesh
    # Of several processes one holds the lock and tidies.
    lock = records.locked(run.folder) if sharding.is_chief() else contextlib.nullcontext()
    with lock, run.checkpoints(stage) as checkpoints:
        if sharding.is_chief():
            checkpoints.tidy()
        sharding.wait_for_all(stage)
        if checkpoints.progress().get('finished'):
            screen.say(f'{stage}: finished before')
            return
        compile_ahead(run)
        module, key, optimizer, program, _ = plan(run, stage)
        make = functools.partial(initial, module)
        params = sharding.born(make, mesh)(jax.random.fold_in(key, 0))
        if checkpoints.last_step() is None:
            params = sharding.placed(_begin(run, stage, params, key), mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        screen.say(f'{stage}: {label(config, stage)}, {count:,} parameters')
        with (
            _scalars(run.folder / 'tensorboard' / stage) as scalars,
            contextlib.closing(Profile(config.profile)) as profile,
        ):
            _, progress = train.fit(
                stage=stage,
                state=programs.begin(params, optimizer, mesh),
                program=program,
                key=jax.random.fold_in(key, 1),
                epoch_of=epochs.in_advance(epochs_of(run, stage)),
                refresh=_refresh(run, stage, module, jax.random.fold_in(key, 3)),
                validate=_validation(run, stage),
                limits=train.Limits(
                    num_epochs,
                    config.patience,
                    config.checkpoint_every,
                    config.checkpoint_seconds,
                ),
                checkpoints=checkpoints,
                metrics=run.metrics,
                screen=screen,
                scalars=scalars,
                data_sha256=run.data.card['fingerprint'],
                machine=machine(),
                profile=profile,
            )
    screen.say(
        f'{stage}: best epoch {progress.best_epoch} of {progress.epoch}, validation NDCG@20 '
        f'{progress.best_value:.4f}, {duration(progress.seconds)}'
    )


def _key(config: Config, stage: str) -> Array:
    """The stage's random key; an rbg key draws faster, a threefry key the same everywhere."""
    impl = {'rbg': 'rbg', 'threefry': 'threefry2x32'}[config.random_bits]
    return jax.random.fold_in(jax.random.key(config.seed, impl=impl), TRAINED.index(stage))


def _objective(run: Run, stage: str, module: Any) -> Callable[..., Any]:
    """What a stage is trained on, (params, batch, key) -> (sum, count)."""
    objective = functools.partial(build_objective(run.name(stage), run.config), module)
    if run.config.negatives == 'uniform':
        return objective
    items, _ = sequences.split_training(run.data)
    count_V = np.bincount(items, minlength=run.data.num_items + 1)
    objective = jax.tree_util.Partial(
        objective, popularity_V=jax.numpy.asarray(losses.cumulate(count_V))
    )
    return sharding.placed(objective, run.mesh)


def _make_optimizer(run: Run, stage: str, params: Tree) -> optax.GradientTransformation:
    """Adam, that leaves alone what the config says shall stay."""
    config = run.config
    rates = {'pretrain': config.learning_rate, 'finetune': config.finetune_learning_rate}
    moving = {}
    if config.unseen_items == 'kept':
        seen_V = pipeline.seen(_windows(run), run.data.num_items)
        seen_V = np.pad(
            seen_V, (0, sharding.table_rows(run.data.num_items, run.mesh) - len(seen_V))
        )
        moving = {'item_table': seen_V, 'output_table': seen_V}
    return programs.make_optimizer(
        rates[stage],
        config.adam_b2,
        config.weight_decay,
        frozen=[name for name in ('frozen_table', 'intents') if name in params],
        moving=moving,
    )


def _begin(run: Run, stage: str, params: Tree, key: Array) -> Tree:
    """What a stage starts from: the backbone through surgery, item vectors, or chance."""
    config, start = run.config, None
    if config.item_init != 'random':
        start = item_table.read(
            config.item_init,
            Path(config.backbone_from or run.folder) / 'text',
            run.data.num_items,
            config.width,
            run.data.card['fingerprint'],
        )
    if stage == 'finetune' and config.finetune_from == 'pretrain':
        params = _operate(run, params, key)
    elif start:
        params = item_table.fill(params, start, config.item_scale, config.item_training)
    return item_table.align(params, start) if start and stage == 'finetune' else params


def _operate(run: Run, fresh: Tree, key: Array) -> Tree:
    """The pre-trained backbone as FAME."""
    backbone = run.module('pretrain', run.mesh)
    source = run.config.backbone_from
    folder = Path(source or run.folder) / 'checkpoints' / 'pretrain'
    if not folder.is_dir():
        raise UserError(
            f'{folder} is not there: no backbone to fine-tune; add pretrain to --stages, or '
            'fine-tune with --finetune_from=scratch'
        )
    if source:
        _refuse_other_backbone(run, source)
    with run.checkpoints('pretrain', source) as checkpoints:
        if not checkpoints.progress().get('finished'):
            raise UserError(f'{folder} holds no finished backbone; run its pretrain stage first')
        pretrained = checkpoints.restore(best=abstract(backbone))['best']
    config = run.config
    plan = build_plan(config.model, config, run.module('finetune'), jax.random.fold_in(key, 2))
    return surgery.transplant(pretrained, fresh, plan)


def _refuse_other_backbone(run: Run, source: str) -> None:
    """A backbone trained with other fields might fit by its shapes and mean something else."""
    theirs = config_lib.read(Path(source) / 'flags.cfg')
    module = type(run.module('pretrain'))
    names = {field.name for field in dataclasses.fields(module)} - {'dropout', 'dtype'}
    names |= {'item_init', 'item_scale', 'unseen_items'}
    names |= set(config_lib.TEXT) if theirs.item_init == 'text' else set()
    differ = [
        f'--{name}={getattr(run.config, name)} (there: {getattr(theirs, name)})'
        for name in config_lib.fields()
        if name in names and getattr(run.config, name) != getattr(theirs, name)
    ]
    if differ:
        raise UserError(f'--backbone_from={source} is another model: {", ".join(differ)}')


def _windows(run: Run) -> pipeline.Windows:
    """What is trained on."""
    cut = pipeline.windows(
        *sequences.split_training(run.data), run.config.max_length, run.config.long_histories
    )
    if not len(cut.starts):
        raise UserError(
            f'{run.folder / "dataset"}: no user has more than three items, so that nothing is left '
            'to train on; use more data'
        )
    return cut


def epochs_of(run: Run, stage: str) -> Callable[[int], train.Epoch]:
    """The training data by epoch, laid out as the stage's model wants it."""
    config, cut = run.config, _windows(run)
    layout = MODELS[run.name(stage)].layout
    one_row = config.max_length + (layout == 'cloze')
    part = sharding.rows_of_process(run.mesh, config.rows_per_step)
    packed = config.packed and layout != 'prefixes'

    def epoch_of(epoch: int) -> train.Epoch:
        batches, num_steps = epochs.epoch(
            cut,
            seed=config.seed,
            epoch=epoch,
            packed=packed,
            row_length=config.row_length if packed else one_row,
            rows_per_step=config.rows_per_step,
            loss_positions=config.loss_positions,
            layout=layout,
            part=part,
        )
        return train.Epoch(batches, num_steps, len(cut.starts))

    return epoch_of


def _refresh(run: Run, stage: str, module: Any, key: Array) -> Callable[[Tree, int], Tree]:
    """What comes before an epoch: nothing, or the model's own."""
    refresh = MODELS[run.name(stage)].refresh
    if refresh is None:
        return lambda params, epoch: params
    epoch_of = epochs_of(run, stage)

    def before(params: Tree, epoch: int) -> Tree:
        return refresh(module, params, epoch_of(epoch).batches, jax.random.fold_in(key, epoch))

    return before


def _validation(run: Run, stage: str) -> Callable[[Tree], dict[str, float]]:
    ranks = run.ranker(stage)

    def validate(params: Tree) -> dict[str, float]:
        return judge.metrics(ranks(params, 'validation').masked)

    return validate


@contextlib.contextmanager
def _scalars(folder: Path) -> Iterator[Callable[[str, int, dict[str, float]], None]]:
    """TensorBoard's writer as a function (stage, step, values)."""
    if not sharding.is_chief():
        yield lambda *values: None
        return
    from tensorboardX import SummaryWriter  # here, for it is slow to import

    doing = f'writing TensorBoard events in {folder}'
    with explain_os_errors(doing):
        writer = SummaryWriter(str(folder))

    def scalars(stage: str, step: int, values: dict[str, float]) -> None:
        with explain_os_errors(doing):
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    try:
        yield scalars
    finally:
        writer.close()


STAGES = {
    'prepare': prepare,
    'text': text,
    'pretrain': pretrain,
    'finetune': finetune,
    'evaluate': evaluate,
    **serving.STAGES,
    'report': report,
}
