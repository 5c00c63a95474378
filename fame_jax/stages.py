"""The stages of a run, each from what the workdir holds to what it shall hold."""

import contextlib
import dataclasses
import functools
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fame_jax
from fame_jax import config as config_lib
from fame_jax import evaluate as judge
from fame_jax import records, surgery, train
from fame_jax.checkpoint import Checkpoints
from fame_jax.config import Config
from fame_jax.data import pipeline, sequences
from fame_jax.data.prepare import prepare as prepare_data
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models import fame
from fame_jax.models.build import MODELS, build, build_objective, initial
from fame_jax.screen import Screen, duration, table

Array = jax.Array
Tree = Any

TRAINED = ('pretrain', 'finetune')


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's config, folder and screen, as the stages take them."""

    config: Config
    folder: Path
    screen: Screen

    @functools.cached_property
    def metrics(self) -> records.Metrics:
        return records.Metrics(self.folder / 'metrics.jsonl')

    @functools.cached_property
    def data(self) -> sequences.Sequences:
        """The prepared data; an error tells to run prepare first."""
        if not (self.folder / 'dataset').exists():
            raise UserError(f'{self.folder} holds no prepared data; run --stages=prepare first')
        return sequences.load(self.folder / 'dataset')

    @functools.cached_property
    def held(self) -> dict[str, list[pipeline.Held]]:
        """The users to be judged, by split, cut in chunks once."""
        return {
            split: list(
                pipeline.held_rows(
                    *sequences.held_out(self.data, split),
                    self.config.max_length,
                    min(self.config.eval_users, self.data.num_users),
                )
            )
            for split in ('validation', 'test')
        }

    def name(self, stage: str) -> str:
        """The model that a stage trains."""
        model = self.config.model
        return (MODELS[model].backbone or model) if stage == 'pretrain' else model

    def module(self, stage: str) -> Any:
        """The module that a stage trains."""
        return build(self.name(stage), self.config, self.data.num_items)

    def checkpoints(self, stage: str) -> Checkpoints:
        """The stage's checkpoints."""
        return Checkpoints(self.folder / 'checkpoints' / stage)


def open_run(config: Config) -> Run:
    """Makes the run's folder and its flags.cfg.

    Raises:
      UserError: when the folder cannot be made or written.
    """
    folder = Path(config.workdir)
    advice = 'choose another --workdir'
    with explain_os_errors(f'making the folder {folder}', advice):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'flags.cfg').exists():
        records.write_text(folder / 'flags.cfg', config_lib.text(config))
    if config.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    return Run(config, folder, Screen(config.progress))


def prepare(run: Run) -> None:
    """Finds, filters and re-indexes the data set."""
    folder = run.folder / 'dataset'
    if folder.exists():
        run.screen.say(f'prepare: {folder} is there')
        return
    began = time.monotonic()
    options = {name: getattr(run.config, name) for name in PREPARE_OPTIONS}
    data = prepare_data(run.config.dataset, seed=run.config.synthetic_seed, **options)
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
    _train(run, 'pretrain', run.config.pretrain_epochs, run.config.learning_rate)


def finetune(run: Run) -> None:
    """Trains FAME end to end, from its backbone through surgery or from scratch."""
    _train(run, 'finetune', run.config.finetune_epochs, run.config.finetune_learning_rate)


def _train(run: Run, stage: str, epochs: int, learning_rate: float) -> None:
    config, screen = run.config, run.screen
    module = run.module(stage)
    key = _key(config, stage)
    with run.checkpoints(stage) as checkpoints:
        _refuse_other_data(run, checkpoints, checkpoints.progress())
        if checkpoints.progress().get('finished'):
            screen.say(f'{stage}: finished before')
            return
        params = initial(module, jax.random.fold_in(key, 0))
        if stage == 'finetune' and config.finetune_from == 'pretrain':
            params = _operate(run, params, key)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        screen.say(f'{stage}: {label(config, stage)}, {count:,} parameters')
        optimizer = train.make_optimizer(learning_rate, config.adam_b2, config.weight_decay)
        objective = build_objective(run.name(stage), config)
        with _scalars(run.folder / 'tensorboard' / stage) as scalars:
            _, progress = train.fit(
                stage=stage,
                params=params,
                optimizer=optimizer,
                step=train.make_step(functools.partial(objective, module), optimizer),
                key=jax.random.fold_in(key, 1),
                epoch_of=epochs_of(run),
                validate=_validation(run, module),
                limits=train.Limits(epochs, config.patience, config.checkpoint_every),
                checkpoints=checkpoints,
                metrics=run.metrics,
                screen=screen,
                scalars=scalars,
                data_sha256=run.data.card['fingerprint'],
            )
    screen.say(
        f'{stage}: best epoch {progress.best_epoch} of {progress.epoch}, validation NDCG@20 '
        f'{progress.best_value:.4f}, {duration(progress.seconds)}'
    )


def _key(config: Config, stage: str) -> Array:
    """The stage's random key; an rbg key draws faster, a threefry key the same everywhere."""
    impl = {'rbg': 'rbg', 'threefry': 'threefry2x32'}[config.random_bits]
    return jax.random.fold_in(jax.random.key(config.seed, impl=impl), TRAINED.index(stage))


def _operate(run: Run, fresh: Tree, key: Array) -> Tree:
    """The pre-trained backbone as FAME."""
    backbone = run.module('pretrain')
    source = Path(run.config.backbone_from or run.folder) / 'checkpoints' / 'pretrain'
    if not source.is_dir():
        raise UserError(
            f'{source} is not there: no backbone to fine-tune; add pretrain to --stages, or '
            'fine-tune with --finetune_from=scratch'
        )
    with Checkpoints(source) as checkpoints:
        progress = checkpoints.progress()
        if not progress.get('finished'):
            raise UserError(
                f'{source} holds no finished backbone; run its pretrain stage to its end'
            )
        _refuse_other_data(run, checkpoints, progress)
        like = jax.eval_shape(functools.partial(initial, backbone), jax.random.key(0))
        pretrained = checkpoints.restore(best=like)['best']
    config = run.config
    plan = fame.plan(
        run.module('finetune'), jax.random.fold_in(key, 2), config.expert_init, config.expert_noise
    )
    return surgery.transplant(pretrained, fresh, plan)


def _refuse_other_data(run: Run, checkpoints: Checkpoints, progress: dict[str, Any]) -> None:
    if progress and progress['data_sha256'] != run.data.card['fingerprint']:
        raise UserError(
            f'{checkpoints.folder} was trained on other data than {run.folder / "dataset"} holds; '
            'take the two from one run'
        )


def epochs_of(run: Run) -> Callable[[int], train.Epoch]:
    """The training data by epoch."""
    config = run.config
    cut = pipeline.windows(
        *sequences.split_training(run.data), config.max_length, config.long_histories
    )
    if not len(cut.starts):
        raise UserError(
            f'{run.folder / "dataset"}: no user has more than three items, so that nothing is left '
            'to train on; use more data'
        )

    def epoch_of(epoch: int) -> train.Epoch:
        batches, num_steps = pipeline.epoch(
            cut,
            seed=config.seed,
            epoch=epoch,
            packed=config.packed,
            row_length=config.row_length if config.packed else config.max_length,
            rows_per_step=config.rows_per_step,
            loss_positions=config.loss_positions,
        )
        return train.Epoch(batches, num_steps, len(cut.starts))

    return epoch_of


def ranker(run: Run, module: Any) -> Callable[[Tree, str], judge.Ranks]:
    """(params, split) -> ranks of all users."""

    def encode(params: Tree, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> Array:
        query_B1D, _ = module.apply(
            {'params': params}, tokens_BL, positions_BL, segments_BL, last=True
        )
        return query_B1D[:, 0]

    item_vectors = jax.jit(lambda params: module.apply({'params': params}, method='item_vectors'))

    def ranks(params: Tree, split: str) -> judge.Ranks:
        item_VD = item_vectors(params)
        return judge.rank_users(encode, params, item_VD, run.held[split], run.data.num_users)

    return ranks


def _validation(run: Run, module: Any) -> Callable[[Tree], dict[str, float]]:
    ranks = ranker(run, module)

    def validate(params: Tree) -> dict[str, float]:
        return judge.metrics(ranks(params, 'validation').masked)

    return validate


@contextlib.contextmanager
def _scalars(folder: Path) -> Iterator[Callable[[str, int, dict[str, float]], None]]:
    """TensorBoard's writer as a function (stage, step, values)."""
    from tensorboardX import SummaryWriter  # here, for it is slow to import

    with explain_os_errors(f'writing TensorBoard events in {folder}'):
        writer = SummaryWriter(str(folder))

    def scalars(stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield scalars
    finally:
        writer.close()


def evaluate(run: Run) -> None:
    """Judges every trained stage of the run on validation and test, beside popularity."""
    config, screen = run.config, run.screen
    trained = [s for s in TRAINED if (run.folder / 'checkpoints' / s).is_dir()]
    results, ranks = {'popularity': _popularity(run, ranks := {})}, ranks
    stages = {}
    for stage in trained:
        module = run.module(stage)
        like = jax.eval_shape(functools.partial(initial, module), jax.random.key(0))
        with run.checkpoints(stage) as checkpoints:
            progress = checkpoints.progress()
            _refuse_other_data(run, checkpoints, progress)
            if not progress.get('finished'):
                screen.say(f'evaluate: {stage} is not finished; its best epoch so far is judged')
            params = checkpoints.restore(best=like)['best']
        began = time.monotonic()
        results[stage] = {'model': label(config, stage)}
        rank = ranker(run, module)
        for split in ('validation', 'test'):
            found = rank(params, split)
            results[stage][split] = {p: judge.metrics(getattr(found, p)) for p in judge.PROTOCOLS}
            ranks |= {f'{stage}/{split}/{p}': getattr(found, p) for p in judge.PROTOCOLS}
        if stage == 'finetune' and run.data.item_facets is not None:
            results[stage]['facets'] = _facets(run, module, params)
        stages[stage] = {
            'best_epoch': progress['best_epoch'],
            'epochs': progress['epoch'],
            'steps': progress['step'],
            'seconds': progress['seconds'],
            'evaluation_seconds': time.monotonic() - began,
            'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
        }
    with records.replacing(run.folder / 'ranks.npz') as file:
        np.savez_compressed(file, **ranks)
    card = protocol_card(run, stages)
    records.write_json(run.folder / 'results.json', {'card': card, 'results': results})
    shown = {r['model']: r['test'] for r in results.values()}
    print(
        f'\n{run.data.card["name"]}, test, all {run.data.num_users:,} users against all '
        f'{run.data.num_items:,} items\n'
    )
    columns = [f'{m}@{k}' for m in ('hr', 'ndcg') for k in judge.CUTOFFS]
    print(table(shown, columns))
    print(f'\nEverything of this run is in {run.folder}; results.json holds the protocol card.')


def _facets(run: Run, module: Any, params: Tree) -> dict[str, Any]:
    """How far FAME's heads recover the facets that are known."""
    item_VD = module.apply({'params': params}, method='item_vectors')
    facet_HDK = params['facet_block']['facet']
    item_HVK = jnp.einsum('VD,HDK->HVK', item_VD[1:], facet_HDK)
    found = judge.match_heads(np.asarray(item_HVK, np.float32), run.data.item_facets[1:])
    whole = judge.neighbour_agreement(
        np.asarray(item_VD[1:], np.float32), run.data.item_facets[1:], 10
    )
    return found | {'whole_vector': whole.tolist()}


def _popularity(run: Run, ranks: dict[str, np.ndarray]) -> dict[str, Any]:
    items, _ = sequences.split_training(run.data)
    query_D, item_VD = judge.popularity(items, run.data.num_items)
    result: dict[str, Any] = {'model': 'popularity'}
    for split in ('validation', 'test'):
        found = judge.rank_users(
            _everyone_alike, query_D, item_VD, run.held[split], run.data.num_users
        )
        result[split] = {p: judge.metrics(getattr(found, p)) for p in judge.PROTOCOLS}
        ranks |= {f'popularity/{split}/{p}': getattr(found, p) for p in judge.PROTOCOLS}
    return result


def _everyone_alike(query_D: Array, tokens_BL: Array, *_: Array) -> Array:
    return jnp.broadcast_to(query_D[None], (tokens_BL.shape[0], query_D.shape[0]))


def label(config: Config, stage: str) -> str:
    """A model and what sets it apart, as results name it."""
    if stage == 'pretrain':  # the backbone, or a model without one
        name = MODELS[config.model].backbone or config.model
        return {'sasrec': 'SASRec'}.get(name, name)
    parts = [f'H {config.num_heads}', f'N {config.num_experts}']
    parts += ['without MoE'] if config.num_experts == 1 else []
    parts += ['from scratch'] if config.finetune_from == 'scratch' else []
    parts += ['as the paper reads'] if config.reading == 'paper' else []
    return f'FAME ({", ".join(parts)})'


def protocol_card(run: Run, stages: dict[str, Any]) -> dict[str, Any]:
    """What a figure must carry to mean something."""
    config, card = run.config, run.data.card
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    device = jax.devices()[0]
    return {
        'dataset': card,
        'split': 'leave one out: last item test, the one before validation, the rest training',
        'candidates': 'all items of the catalogue',
        'masked': 'items of the whole history before the target score -inf',
        'unmasked': 'nothing is masked but the padding',
        'ties': 'count against the target',
        'selection': f'best epoch by validation {train.SELECT_ON}, masked, all users',
        'seed': config.seed,
        'config': {n: getattr(config, n) for n in config_lib.fields()},
        'code': fame_jax.__version__,
        'versions': {'python': platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        'device': {
            'kind': device.device_kind,
            'platform': device.platform,
            'count': jax.device_count(),
        },
        'machine': {'system': platform.platform(), 'cores': len(_affinity())},
        'stages': stages,
        'peak_memory_bytes': peak_memory(),
        'date': time.strftime('%Y-%m-%d'),
    }


def _affinity() -> set[int]:
    import os

    return (
        os.sched_getaffinity(0)
        if hasattr(os, 'sched_getaffinity')
        else set(range(os.cpu_count() or 1))
    )


def peak_memory() -> int:
    """The most memory this process held so far, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


STAGES = {'prepare': prepare, 'pretrain': pretrain, 'finetune': finetune, 'evaluate': evaluate}
