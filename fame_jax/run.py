"""A run in memory: its config and folder, and what its stages have in common."""

import concurrent.futures
import dataclasses
import functools
import os
import platform
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import fame_jax
from fame_jax import config as config_lib
from fame_jax import evaluate, records, sharding
from fame_jax.checkpoint import Checkpoints
from fame_jax.config import Config
from fame_jax.data import pipeline, sequences
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models.build import MODELS, build, initial
from fame_jax.recipes import RECIPES
from fame_jax.screen import Screen

Array = jax.Array
Tree = Any

TRAINED = ('pretrain', 'finetune')
# What sets one FAME+ apart from another in the name that results give it.
TOLD_OF_TEXT = ('shuffled_labels', 'text_encoder', 'text_design', 'text_alternation')


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's config, folder and screen, as the stages take them."""

    config: Config
    folder: Path
    screen: Screen

    # What stages to come will run is compiled here, one program after another.
    ahead: concurrent.futures.Executor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1, 'ahead'),
        init=False,
        repr=False,
        compare=False,
    )

    def close(self) -> None:
        """Lets be what nobody will wait for any more."""
        self.ahead.shutdown(wait=False, cancel_futures=True)

    @functools.cached_property
    def metrics(self) -> records.Metrics:
        kind = records.Metrics if sharding.is_chief() else records.Unwritten
        return kind(self.folder / 'metrics.jsonl')

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that train, judge and recommend, if they are more than one."""
        return sharding.make_mesh(self.config.data_parallel, self.config.model_parallel)

    @functools.cached_property
    def data(self) -> sequences.Sequences:
        """The prepared data; an error tells to run prepare first."""
        if not self.prepared:
            raise UserError(f'{self.folder} holds no prepared data; run --stages=prepare first')
        return sequences.load(self.folder / 'dataset')

    @functools.cached_property
    def held(self) -> dict[str, list[pipeline.Held]]:
        """The users to be judged, by split, cut in chunks once; the devices share each."""
        users = min(self.config.eval_users, self.data.num_users)
        users += -users % self.config.data_parallel
        return {
            split: list(
                pipeline.held_rows(
                    *sequences.held_out(self.data, split), self.config.max_length, users
                )
            )
            for split in ('validation', 'test')
        }

    @property
    def prepared(self) -> bool:
        """Whether the folder holds its data; from then on it is this run's and no other's."""
        return (self.folder / 'dataset' / 'dataset.json').is_file()

    def remember(self) -> None:
        """Writes flags.cfg; a run that goes on with further stages has them all in it."""
        if not sharding.is_chief():
            return
        path, stages = self.folder / 'flags.cfg', self.config.stages
        if path.exists():
            stages += config_lib.read(path).stages
        stages = tuple(stage for stage in config_lib.MAKING if stage in stages)
        usual = {name: config_lib.fields()[name].default for name in config_lib.USING}
        text = config_lib.text(dataclasses.replace(self.config, stages=stages, **usual))
        if not path.exists() or path.read_text() != text:
            records.write_text(path, text)

    def name(self, stage: str) -> str:
        """The model that a stage trains."""
        model = self.config.model
        return (MODELS[model].backbone or model) if stage == 'pretrain' else model

    def module(self, stage: str, mesh: jax.sharding.Mesh | None = None) -> Any:
        """The module that a stage trains, its tables shared by a mesh."""
        return build(self.name(stage), self.config, self.data.num_items, mesh)

    def ranker(self, stage: str) -> 'Ranker':
        """What ranks by a stage's model; one for all stages that judge it, so compiled once."""
        if stage not in self._rankers:
            self._rankers[stage] = Ranker(self, self.module(stage, self.mesh))
        return self._rankers[stage]

    @functools.cached_property
    def _rankers(self) -> dict[str, 'Ranker']:
        return {}

    def checkpoints(self, stage: str, folder: str = '') -> Checkpoints:
        """The stage's checkpoints, or those of the run in another folder; of the same data.

        Raises:
          UserError: when they are of other data.
        """
        found = Checkpoints(Path(folder or self.folder) / 'checkpoints' / stage)
        progress = found.progress()
        if progress and progress.get('data_sha256') != self.data.card['fingerprint']:
            found.close()
            raise UserError(
                f'{found.folder} was trained on other data than {self.folder / "dataset"} holds; '
                'take the two from one run'
            )
        return found

    @functools.cached_property
    def plans(self) -> dict[str, Any]:
        """What each stage trains by, as the stages have made it; see `stages.plan`."""
        return {}

    def is_finished(self, stage: str) -> bool:
        """Whether the stage has trained to its end."""
        if not (self.folder / 'checkpoints' / stage).is_dir():
            return False
        with self.checkpoints(stage) as checkpoints:
            return bool(checkpoints.progress().get('finished'))

    def is_trained(self, stage: str) -> bool:
        """Whether the stage has left a checkpoint, finished or not."""
        if not (self.folder / 'checkpoints' / stage).is_dir():
            return False
        with self.checkpoints(stage) as checkpoints:
            return checkpoints.last_step() is not None

    def best(self, stage: str, module: Any = None) -> tuple[Tree, dict[str, Any]]:
        """The parameters of a stage's best epoch, without its optimizer, and its progress.

        They lie where the module has them; without one, on one device.
        """
        like = abstract(module or self.module(stage))
        with self.checkpoints(stage) as checkpoints:
            return checkpoints.restore(best=like)['best'], checkpoints.progress()


def open_run(config: Config) -> Run:
    """Makes the run's folder.

    Raises:
      UserError: when the folder cannot be made or written.
    """
    folder = Path(config.workdir)
    advice = 'choose another --workdir'
    with explain_os_errors(f'making the folder {folder}', advice):
        folder.mkdir(parents=True, exist_ok=True)
    if config.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    run = Run(config, folder, Screen(config.progress if sharding.is_chief() else 'none'))
    if config.num_processes > 1:
        run.screen.say(
            f'{config.num_processes} processes: should one of them die, the others are stopped '
            f'within {sharding.HEARTBEAT} s, and the same commands go on from the last checkpoint'
        )
    if run.prepared:
        run.remember()
    return run


def abstract(module: Any) -> Tree:
    """The shapes of a model's parameters, with the place of each."""
    tree = jax.eval_shape(functools.partial(initial, module), jax.random.key(0))
    return sharding.outline(tree, module.mesh)


class Ranker:
    """Ranks all users by one model's parameters; compiled once for each shape of their rows."""

    def __init__(self, run: Run, module: Any):
        """Compiles nothing yet."""
        self._run, self._module = run, module
        self._programs: dict[tuple, Any] = {}
        self._lock = threading.Lock()

        def encode(params: Tree, *rows: Array) -> Array:
            return module.apply({'params': params}, *rows, last=True)[0]

        def vectors(params: Tree) -> Array:
            return module.apply({'params': params}, method='item_vectors')

        self._encode = encode
        self._vectors = jax.jit(vectors, out_shardings=sharding.by_items(module.mesh))

    def __call__(self, params: Tree, split: str) -> evaluate.Ranks:
        """The rank of each user's target of a split."""
        self.compile(split)
        return evaluate.rank_users(
            self._encode,
            params,
            self._vectors(params),
            self._run.held[split],
            self._run.data.num_users,
            self._module.combine,
            programs=self._programs,
            **self._options(),
        )

    def compile(self, split: str) -> None:
        """Compiles what a split needs and no earlier one did, from shapes alone."""
        params = abstract(self._module)
        item_VD = jax.ShapeDtypeStruct.update(
            jax.eval_shape(self._vectors, params), sharding=sharding.by_items(self._module.mesh)
        )
        with self._lock:
            evaluate.compile_ranking(
                self._programs,
                self._encode,
                params,
                item_VD,
                self._run.held[split],
                self._module.combine,
                **self._options(),
            )

    def _options(self) -> dict[str, Any]:
        return {
            'eval_items': self._run.config.eval_items,
            'num_items': self._run.data.num_items,
            'mesh': self._module.mesh,
        }


def label(config: Config, stage: str) -> str:
    """A model and what sets it apart from its defaults, as results name it."""
    model = config.model if stage == 'finetune' else (MODELS[config.model].backbone or config.model)
    module, row = MODELS[model].module, MODELS[model]
    names = {field.name for field in dataclasses.fields(module)}
    names |= {*row.options, *row.plan_options, 'loss_positions'}
    names |= {'finetune_from'} if stage == 'finetune' else set()
    plus = config.item_init == 'text' and model in config_lib.FAMES
    names |= set() if plus else {'item_init'}
    names |= {'unseen_items', *TOLD_OF_TEXT}
    own = {f: getattr(config, f) for f in config_lib.fields() if f in names}
    usual = {f: field.default for f, field in config_lib.fields().items()} | RECIPES.get(model, {})
    told = {f: v for f, v in own.items() if v != usual[f]}
    told = {f: v for f, v in told.items() if not f.startswith('chunk_')}  # the same loss
    parts = []
    if 'num_experts' in own:
        told = {f: v for f, v in told.items() if f not in ('num_heads', 'num_experts')}
        parts += [f'H {config.num_heads}', f'N {config.num_experts}']
        parts += ['without MoE'] if config.num_experts == 1 else []
        literal = config_lib.PAPER_READING | {'positions': 'start', 'similarity': 'dot'}
        if all(own[f] == value for f, value in literal.items()):
            parts.append('as the paper reads')
            told = {f: v for f, v in told.items() if f not in literal}
    parts += [f'{f} {config_lib.show(value)}' for f, value in told.items()]
    return row.title + plus * '+' + (f' ({", ".join(parts)})' if parts else '')


def machine() -> dict[str, Any]:
    """What this process computes with, as records tell it."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    device = jax.devices()[0]
    return {
        'code': fame_jax.__version__,
        'versions': {'python': platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        'device': {
            'kind': device.device_kind,
            'platform': device.platform,
            'count': jax.device_count(),
        },
        'system': platform.platform(),
        'cores': cores(),
        'date': time.strftime('%Y-%m-%d'),
    }


def cores() -> int:
    """The processor cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
