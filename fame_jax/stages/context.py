"""A run in memory: its settings, folder and data, and the objects that its stages share."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import run_dir
from fame_jax.config import Config
from fame_jax.config import flags as config_flags
from fame_jax.data import changes
from fame_jax.data.card import REPEATS_RULE, describe_split, repeat_share
from fame_jax.data.dataset import Dataset
from fame_jax.data.eval_batches import EvalBatches
from fame_jax.errors import UserError
from fame_jax.evaluation.ranker import Ranker
from fame_jax.models import registry, text_path
from fame_jax.models.item_model import ItemModel
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.parallel import processes
from fame_jax.screen import Screen
from fame_jax.stages import settings
from fame_jax.text import item_init
from fame_jax.training import loop, trackers
from fame_jax.training.checkpoint import Checkpoints

Tree = Any

TRAINED = settings.TRAINED  # stages that train a model
SPLITS = ('validation', 'test')
EVAL_USERS = 1024  # users that are ranked at a time


class RunContext:
    """What the stages of a run take.

    Attributes:
      config: all settings, the model's options written out.
      model: the module of --model, of which `module` makes those of the stages.
      folder: the run's folder.
      screen: the terminal.
      executor: one thread, in which XLA compiles programs of this and of later stages.
      setups: by stage, what it trains with, so that it is compiled once; see train.py.
      programs: by name, what a stage compiles: its steps, its optimizer and the draws of its
        initial parameters; runs that differ in their seeds share them.
      prints: whether stages print their results to stdout.
    """

    def __init__(self, config: Config, model: ItemModel, folder: Path, screen: Screen):
        """Reads and writes nothing."""
        self.config = config
        self.model = model
        self.folder = folder
        self.screen = screen
        self.executor = concurrent.futures.ThreadPoolExecutor(1, 'compile')
        self.setups: dict[str, Any] = {}
        self.programs: dict[str, Any] = {}
        self.prints = True
        self._rankers: dict[str, Ranker] = {}
        self._lock = contextlib.ExitStack()
        self._writes = False
        self._says_split = True
        self._check_again: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Cancels compilations that have not started, and lets other processes write."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self._lock.close()

    def share(self, other: 'RunContext', programs: bool = True, rankers: bool = True) -> None:
        """Takes the data of another run, and what it has compiled.

        Args:
          other: the run.
          programs: its steps too; the runs then differ in their seeds alone.
          rankers: its rankers too; the runs then differ in nothing else that changes a ranking,
            which a temperature does by rounding alone.
        """
        for name in ('data', 'eval_batches', 'selection_users', 'repeats'):
            self.__dict__[name] = getattr(other, name)  # in the place of the cached property
        if programs:
            self.programs = other.programs
        if rankers:
            self._rankers = other._rankers
        self._says_split = False  # the other says it

    def begin_writing(self) -> None:
        """Makes the run's folder and locks it until `close`; each stage that writes there calls it.

        Of several processes the first one locks it.

        Raises:
          UserError: when another process writes there, or has made another run of it since this
            context was opened.
        """
        if self._writes or not processes.is_chief():
            return
        self._lock.enter_context(run_dir.lock(self.folder))
        self._check_again()
        self._writes = True
        # Stages that only use a run leave its flags.cfg as it is.
        if self.is_prepared and set(self.config.run.stages) & set(settings.TRAINING_STAGES):
            self.write_flags()

    @functools.cached_property
    def metrics(self) -> run_dir.Metrics:
        """metrics.jsonl; of several processes the first writes it."""
        kind = run_dir.Metrics if processes.is_chief() else run_dir.NullMetrics
        return kind(self.folder / 'metrics.jsonl')

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that train, evaluate and recommend; None for one device."""
        devices = self.config.devices
        return mesh_lib.make_mesh(devices.data_parallel, devices.model_parallel)

    @property
    def dataset_folder(self) -> Path:
        """The folder of the prepared data, of this run or of the run in --prepared."""
        return Path(self.config.data.prepared or self.folder) / 'dataset'

    @property
    def is_prepared(self) -> bool:
        """Whether the prepared data are there."""
        return settings.has_data(self.dataset_folder.parent)

    @functools.cached_property
    def data(self) -> Dataset:
        """The prepared data.

        Raises:
          UserError: when there are none.
        """
        if not self.is_prepared:
            folder = self.dataset_folder.parent
            where = str(folder) if folder.is_dir() else f'{folder}, which does not exist,'
            raise UserError(f'{where} holds no prepared data; run --stages=prepare first')
        with self.screen.waiting(f'reading {self.dataset_folder}'):
            data = self.split(Dataset.load(self.dataset_folder))
        if 'prepare' not in self.config.run.stages:
            log = self.find_changed_log()
            if log is not None:
                self.screen.say(
                    f'warning: {log} has changed since {self.dataset_folder} was prepared from it; '
                    'the prepared data are used'
                )
        return data

    def split(self, data: Dataset) -> Dataset:
        """The data with the run's split.

        Raises:
          UserError: when they cannot be split by time.
        """
        options = self.config.data
        if options.split != 'time':
            return data
        return data.split_by_time(options.split_at, options.split_targets)

    def say_split(self) -> None:
        """Says once which moments a split by time has, and what it counts before and after them."""
        for line in describe_split(self.data) if self._says_split else ():
            self.screen.say(line)
        self._says_split = False

    def find_changed_log(self) -> Path | None:
        """The log, where it is there and differs from the one that was prepared."""
        path, options = self.dataset_folder / 'dataset.json', self.config.data
        card = run_dir.read_json(path)
        with self.screen.waiting(f'comparing {options.dataset} with {path}'):
            return changes.find_changed_log(
                options.dataset, options.data_dir, card if isinstance(card, dict) else {}
            )

    @functools.cached_property
    def repeats(self) -> dict[str, float]:
        """The share of each split's targets that stand in the history of their user."""
        return {split: repeat_share(self.data, split) for split in SPLITS}

    @property
    def selects_masked(self) -> bool:
        """Whether the masked ranking selects the best epoch; lists and recommendations follow it.

        A run that has been trained keeps its ranking; before version 0.3 it was the masked one.
        """
        trained = next(filter(None, map(self.progress, TRAINED)), None)
        if trained:
            return trained.get('select_on', loop.SELECT_ON) == loop.SELECT_ON
        select_on = self.config.training.select_on
        if select_on == 'auto':
            return self.repeats['validation'] <= REPEATS_RULE
        return select_on == 'masked'

    @functools.cached_property
    def eval_batches(self) -> dict[str, EvalBatches]:
        """All targets of each split, and as 'selection' those on which epochs are selected.

        The devices share each batch.
        """
        batches = {split: self._eval_batches(split) for split in SPLITS}
        batches['selection'] = batches['validation']
        if self.selection_users is not None:
            batches['selection'] = self._eval_batches('validation', self.selection_users)
        return batches

    def _eval_batches(self, split: str, chosen: slice | np.ndarray = slice(None)) -> EvalBatches:
        data, parts = self.data, self.config.devices.data_parallel
        starts, ends = (bounds[chosen] for bounds in data.history_bounds(split))
        rows = min(EVAL_USERS, len(starts))
        return EvalBatches(
            data.items,
            starts,
            ends,
            data.items[ends],
            self.config.data.max_length,
            rows + -rows % parts,
            multiple=parts,
        )

    def sample_batches(self, split: str, size: int) -> EvalBatches:
        """A fixed sample of at most `size` targets of a split, drawn from the fingerprint."""
        draw = np.random.default_rng(int(self.data.card['fingerprint'], 16))
        number = self.num_targets(split)
        targets = draw.choice(number, min(size, number), replace=False)
        return self._eval_batches(split, np.sort(targets))

    @functools.cached_property
    def selection_users(self) -> np.ndarray | None:
        """The sample of --validation_users: validation targets, ascending int64; None: all.

        It is drawn from the data's fingerprint, so that all models and seeds have the same one. In
        leave one out each user has one target.
        """
        size, number = self.config.training.validation_users, self.num_targets('validation')
        if not 0 < size < number:
            return None
        draw = np.random.default_rng(int(self.data.card['fingerprint'], 16))
        return np.sort(draw.choice(number, size, replace=False))

    def num_targets(self, split: str) -> int:
        """The number of targets of a split; in leave one out one of each user."""
        return len(self.data.history_bounds(split)[1])

    def describe_selection(self) -> str:
        """The users on whom epochs are selected, in words; targets in a split by time."""
        what = 'targets' if self.data.split.is_by_time else 'users'
        if self.selection_users is None:
            return f'all {what}'
        number = self.num_targets('validation')
        return f'a fixed sample of {len(self.selection_users):,} of {number:,} {what}'

    def module(self, stage: str, mesh: jax.sharding.Mesh | None = None) -> ItemModel:
        """The module that a stage trains, its tables sharded over `mesh`."""
        config = self.config
        fields = {'num_items': self.data.num_items, 'mesh': mesh}
        fields['dtype'] = jnp.dtype(config.training.dtype)
        if hasattr(self.model, 'max_length'):
            fields['max_length'] = config.data.max_length
        model = self.model.clone(**fields)
        if stage == 'pretrain' and model.backbone:
            return model.backbone_module()
        dropout = config.training.finetune_dropout
        return model if dropout is None else model.clone(dropout=dropout)

    def trained_module(self, stage: str, mesh: jax.sharding.Mesh | None = None) -> ItemModel:
        """As `module`, with the map of --text_path among its parameters, where the run has one."""
        path = self.text_path
        width = path['text_vectors'].shape[1] if path else 0
        return self.module(stage, mesh).clone(text_width=width)

    @functools.cached_property
    def text_path(self) -> dict[str, jax.Array]:
        """The constant arrays of --text_path (`text_path.items`); {} without it.

        Raises:
          UserError: when the stage text has not made the vectors.
        """
        text, source = self.config.text, self.config.training.backbone
        if not text.text_path:
            return {}
        run = self.folder if source in ('pretrain', 'scratch') else Path(source)
        data = self.data
        text_VE = item_init.read_text_vectors(
            run / 'text', data.num_items, data.card['fingerprint']
        )
        trained, _ = data.training_histories()
        actions_V = np.bincount(trained, minlength=data.num_items + 1)
        rows = mesh_lib.table_rows(data.num_items, self.mesh)
        constants = text_path.items(text_VE, actions_V, text.text_path_below, rows)
        return mesh_lib.device_put(constants, self.mesh)

    def fold(self, params: Tree, mesh: jax.sharding.Mesh | None = None) -> Tree:
        """Parameters of a `trained_module` as those of `module`: the map is in the item table.

        Args:
          params: of a trained module; without --text_path they are returned as they are.
          mesh: of the module; None for one device.
        """
        constants = self.text_path
        if not constants:
            return params
        if mesh != self.mesh:  # whose table may have another number of rows
            rows = len(params['item_table'])
            constants = {n: _with_rows(mesh_lib.gather(a), rows) for n, a in constants.items()}
        return mesh_lib.device_put(text_path.fold(params, constants), mesh)

    def label(self, stage: str) -> str:
        """The model of a stage as results name it: its title and what differs from defaults."""
        return settings.label(self.config, self.module(stage), stage)

    def ranker(self, stage: str) -> Ranker:
        """Ranks all users by a stage's model; one object for all stages, so compiled once."""
        if stage not in self._rankers:
            module = self.module(stage, self.mesh)
            self._rankers[stage] = Ranker(module, abstract_params(module), self.eval_batches)
        return self._rankers[stage]

    def checkpoints(self, stage: str, folder: str = '') -> Checkpoints:
        """The stage's checkpoints, or those of the run in another folder.

        Raises:
          UserError: when they were trained on other data, or there are none.
        """
        fingerprint = self.data.card['fingerprint']  # before a folder is made
        checkpoints = Checkpoints(Path(folder or self.folder) / 'checkpoints' / stage)
        try:
            progress = loop.check_progress(checkpoints)
        except UserError:
            checkpoints.close()
            raise
        if progress and progress.get('data_sha256') != fingerprint:
            checkpoints.close()
            raise UserError(
                f'{checkpoints.folder} was trained on other data than {self.dataset_folder} '
                'holds; take both from one run'
            )
        return checkpoints

    def limits(self, stage: str) -> loop.Limits:
        """When a stage ends."""
        training = self.config.training
        epochs = getattr(training, f'{stage}_epochs')
        return loop.Limits(epochs, training.patience, training.checkpoint_seconds)

    def is_finished(self, stage: str) -> bool:
        """Whether the stage was trained to its end, under the limits that it has now."""
        return loop.is_finished(self.progress(stage), self.limits(stage))

    def is_trained(self, stage: str) -> bool:
        """Whether the stage has a checkpoint, finished or not."""
        return bool(self.progress(stage))

    def untrained(self) -> UserError:
        """The error of a stage that needs a trained model where there is none."""
        return UserError(f'{self.folder} holds no trained model; run pretrain or finetune first')

    def progress(self, stage: str) -> dict[str, Any]:
        """The progress in the stage's newest checkpoint; empty without one."""
        if not (self.folder / 'checkpoints' / stage).is_dir():
            return {}
        with self.checkpoints(stage) as checkpoints:
            return loop.check_progress(checkpoints)

    def best_params(self, stage: str, module: ItemModel) -> Tree:
        """The parameters of a stage's best epoch, sharded as the module's mesh says.

        They are those of `module`: a map of --text_path is in the item table.
        """
        trained = self.trained_module(stage, module.mesh)
        with self.checkpoints(stage) as checkpoints:
            best = checkpoints.restore(best=abstract_params(trained))['best']
        return self.fold(best, module.mesh)

    def write_flags(self) -> None:
        """Writes flags.cfg, which repeats the run; its stages are all that the run has had."""
        if not processes.is_chief():
            return
        path, stages = self.folder / 'flags.cfg', self.config.run.stages
        if path.exists():
            stages += tuple(config_flags.read(path).get('stages', ()))
        stages = tuple(stage for stage in settings.TRAINING_STAGES if stage in stages)
        text = config_flags.text(self.config.replace(stages=stages))
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            run_dir.write_text(path, text)


def _with_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """The first rows of an array, and zeros after its last one."""
    kept = array[:rows]
    return np.pad(kept, [(0, rows - len(kept)), *[(0, 0)] * (array.ndim - 1)])


def abstract_params(module: ItemModel) -> Tree:
    """Shapes, dtypes and shardings of a model's parameters."""
    tree = jax.eval_shape(functools.partial(registry.init_params, module), jax.random.key(0))
    return mesh_lib.abstract(tree, module.mesh)


def open_run(
    given: config_flags.Given, model: ItemModel | None = None, screen: Screen | None = None
) -> RunContext:
    """Completes the settings of a run; nothing is written yet.

    Args:
      given: the flags of the command.
      model: the module to train, in place of the one that --model and its options name.
      screen: the terminal; None: one of the mode --progress.

    Raises:
      UserError: when the settings do not fit together or do not fit the run that the folder holds.
    """
    config, module = settings.complete(given, model)
    if set(config.run.stages) & set(TRAINED):
        trackers.check(config.run.track)
    devices = config.devices
    if devices.cache_dir:
        programs = str(Path(devices.cache_dir) / 'programs')
        jax.config.update('jax_compilation_cache_dir', programs)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    number = devices.processes[2]
    screen = screen or Screen(config.run.progress if processes.is_chief() else 'none')
    if number > 1:
        screen.say(
            f'{number} processes: if one of them ends, the others stop within '
            f'{processes.HEARTBEAT} s, and the same commands resume from the last checkpoint'
        )
    context = RunContext(config, module, Path(config.run.workdir), screen)

    def check_again() -> None:
        """Refuses a run that another process made between `complete` and the lock."""
        if settings.complete(given, model)[0] != config:
            raise UserError(
                f'{context.folder}: another process has just changed this run; run the same '
                'command again'
            )

    context._check_again = check_again
    return context
