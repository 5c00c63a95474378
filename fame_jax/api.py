"""The Python interface: fit, update, evaluate and load. The command line runs the same stages.

Names are exported from the package itself; see fame_jax/__init__.py.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fame_jax import run_dir, stages
from fame_jax.config import flags
from fame_jax.data import append
from fame_jax.data.dataset import Dataset
from fame_jax.data.eval_batches import EvalBatches
from fame_jax.errors import Interrupted, UserError
from fame_jax.evaluation import ranking
from fame_jax.evaluation.ranking import Ranks
from fame_jax.models import registry
from fame_jax.models.fame import FAME
from fame_jax.models.item_model import ItemModel
from fame_jax.serving import export
from fame_jax.serving.recommender import Recommender
from fame_jax.stages import members, settings, updated_run
from fame_jax.stages.context import EVAL_USERS
from fame_jax.stages.model_source import read_source
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.prepare import save_data

Metrics = dict[str, dict[str, dict[str, float]]]


# Fields of Training that are lists of numbers.
LISTS = ('future_targets', 'finetune_future_targets', 'loss_chunk')


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained; each field is the flag of the same name.

    None means the default: that of the model's recipe, or the one that --help prints.

    Fields:
      seeds: one run for each, of initialisation, batch order, dropout and negatives.
      pretrain_epochs: greatest number of epochs of the backbone, or of a model without one.
      finetune_epochs: greatest number of epochs of fine-tuning.
      patience: epochs without a better validation NDCG@20 after which a stage ends.
      select_on: the ranking of that NDCG@20: 'auto', 'masked' or 'unmasked'.
      learning_rate: Adam's, of pre-training.
      finetune_learning_rate: Adam's, of fine-tuning.
      schedule: of the learning rate over a stage, 'constant' or 'cosine'.
      warmup_epochs: in which the learning rate grows from 0.
      weight_decay: decoupled.
      ema: decay of an average of the weights, which is then what is evaluated; 0: no average.
      finetune_dropout: dropout in fine-tuning; None: that of the model.
      row_length: positions L of a packed row.
      rows_per_step: rows B of a step.
      max_length: latest items of a history that the model sees.
      long_histories: 'split' or 'last'.
      dtype: of activations, 'float32' or 'bfloat16'.
      steps_per_dispatch: steps compiled into one program.
      checkpoint_seconds: least seconds between checkpoints.
      backbone: 'pretrain', 'scratch', or the folder of a run with a finished backbone.
      loss: 'ce', 'bce' or 'sampled'.
      num_negatives: negatives of bce and sampled.
      negatives: 'uniform' or 'popularity'.
      future_targets: shares of the next item, the one after it, and so on, in each label.
      finetune_future_targets: the same in fine-tuning; None: as in pre-training.
      seen_weight: how often an item of the history counts among the negatives.
      loss_chunk: tokens and items of a block of the loss.
      validation_users: users of a fixed sample on whom epochs are selected; 0: all.
    """

    seeds: Sequence[int] = (0,)
    pretrain_epochs: int | None = None
    finetune_epochs: int | None = None
    patience: int | None = None
    select_on: Literal['auto', 'masked', 'unmasked'] | None = None
    learning_rate: float | None = None
    finetune_learning_rate: float | None = None
    schedule: Literal['constant', 'cosine'] | None = None
    warmup_epochs: float | None = None
    weight_decay: float | None = None
    ema: float | None = None
    finetune_dropout: float | None = None
    row_length: int | None = None
    rows_per_step: int | None = None
    max_length: int | None = None
    long_histories: Literal['split', 'last'] | None = None
    dtype: Literal['float32', 'bfloat16'] | None = None
    steps_per_dispatch: int | None = None
    checkpoint_seconds: float | None = None
    backbone: str | None = None
    loss: Literal['ce', 'bce', 'sampled'] | None = None
    num_negatives: int | None = None
    negatives: Literal['uniform', 'popularity'] | None = None
    future_targets: Sequence[float] | None = None
    finetune_future_targets: Sequence[float] | None = None
    seen_weight: float | None = None
    loss_chunk: tuple[int, int] | None = None
    validation_users: int | None = None

    def flags(self) -> list[str]:
        """The fields that are set, as flags; without the seeds."""
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name != 'seeds':
                text = ','.join(map(str, value)) if field.name in LISTS else value
                found.append(f'--{field.name}={text}')
        return found


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A trained and evaluated model.

    Fields:
      metrics: split -> protocol -> metric, such as metrics['test']['masked']['ndcg@10']; means over
        the seeds where there are several.
      deviations: the same with standard deviations over the seeds; {} for one seed.
      stages: the metrics of every stage, of popularity and of the item graph, by name; of the
        first seed.
      history: the lines of metrics.jsonl, one a stage, epoch and split; of the first seed.
      workdir: the folder of the run; of several seeds, the folder of their runs.
      recommender: the best epoch of the last stage; of several seeds, that of the best seed by
        validation NDCG@20.
      runs: one result for each seed; () for one seed.
    """

    metrics: Metrics
    deviations: Metrics
    stages: dict[str, Metrics]
    history: list[dict[str, Any]]
    workdir: Path
    recommender: Recommender
    runs: tuple['FitResult', ...] = ()

    def update(
        self,
        actions: Any,
        *,
        workdir: str | Path | None = None,
        epochs: int | None = None,
        patience: int | None = None,
        learning_rate: float | None = None,
        replay: float | None = None,
        split_at: float | str | None = None,
        progress: Literal['auto', 'bar', 'lines', 'none'] = 'auto',
    ) -> 'FitResult':
        """Appends new actions and trains on, as `fame_jax.update`; of several seeds, each run."""
        more = {'epochs': epochs, 'patience': patience, 'learning_rate': learning_rate}
        more |= {'replay': replay, 'split_at': split_at, 'progress': progress}
        if not self.runs:
            return update(self.workdir, actions, workdir=workdir, **more)
        folder = Path(workdir) if workdir else _updated_folder(self.runs[0].workdir, actions, 2)
        runs = [
            update(run.workdir, actions, workdir=folder / run.workdir.name, **more)
            for run in self.runs
        ]
        return _combine(runs, folder)


def fit(
    data: Dataset,
    model: ItemModel | None = None,
    training: Training = Training(),
    *,
    workdir: str | Path | None = None,
    progress: Literal['auto', 'bar', 'lines', 'none'] = 'auto',
) -> FitResult:
    """Trains a model on all users' training actions, and evaluates it on validation and test.

    FAME is fine-tuned from a backbone, which is pre-trained first. A call that was interrupted, or
    the same call again, goes on from what the folder holds.

    Args:
      data: interactions; the last item of each user is the test target, the one before the
        validation target. `data.split_by_time()` has other targets.
      model: a module such as FAME(width=64) or SASRec(); the number of items is filled in. None:
        FAME().
      training: epochs, rates and seeds.
      workdir: the run's folder; None: a folder under runs/ named by data, model and settings.
      progress: a progress bar, one line an epoch, nothing; 'auto': a bar on a terminal or in a
        notebook, else lines.

    Raises:
      UserError: for settings that do not fit together, or a workdir that holds another run.
    """
    model = FAME() if model is None else model
    _check_types('fit', data=data, model=model, training=training)
    _check_seeds(training)
    if workdir is None:
        workdir = Path('runs') / _folder_name(data, model, training)
    folder = Path(workdir)
    several = len(training.seeds) > 1
    folders = {s: folder / f'seed_{s}' if several else folder for s in training.seeds}
    runs = _fit(data, model, training, folders, folder, progress)
    return _combine(runs, folder) if several else runs[0]


def _combine(runs: Sequence[FitResult], folder: Path) -> FitResult:
    """The result of several seeds: means, deviations, and the best seed by validation."""
    # Runs of earlier versions were selected by the masked ranking.
    select_on = run_dir.read_json(runs[0].workdir / 'results.json')['card'].get('select_on')
    protocol = select_on or 'masked'
    best = max(runs, key=lambda run: run.metrics['validation'][protocol]['ndcg@20'])
    return FitResult(
        metrics=_over_runs(statistics.fmean, [run.metrics for run in runs]),
        deviations=_over_runs(statistics.stdev, [run.metrics for run in runs]),
        stages=runs[0].stages,
        history=runs[0].history,
        workdir=folder,
        recommender=best.recommender,
        runs=tuple(runs),
    )


def update(
    run: str | Path,
    actions: Any,
    *,
    workdir: str | Path | None = None,
    epochs: int | None = None,
    patience: int | None = None,
    learning_rate: float | None = None,
    replay: float | None = None,
    split_at: float | str | None = None,
    progress: Literal['auto', 'bar', 'lines', 'none'] = 'auto',
) -> FitResult:
    """Appends new actions to a run's data, trains its last stage on, and evaluates it.

    Users and items keep their numbers, new ones follow. The run stays as it is; the update is a
    run of its own, which can be updated again. The same call goes on from what its folder holds.

    Args:
      run: the folder of a trained run.
      actions: a frame with the columns that the run's data were made of, or the path of a log in
        the form of the run's; new actions only.
      workdir: the folder of the update; None: one beside the run, named by the new actions.
      epochs: greatest number of epochs.
      patience: epochs without a better validation NDCG@20 after which training ends.
      learning_rate: Adam's; None: that of the run's stage.
      replay: share of the windows without new actions that each epoch trains on too.
      split_at: the later moment of a run that is split by time; None: as there, which is a later
        one if it is a share of all actions.
      progress: as in `fit`.

    Raises:
      UserError: when the folder is no trained run, or the actions do not fit its data.
    """
    stage = updated_run.last_stage(str(run))
    folder = Path(workdir) if workdir else _updated_folder(Path(run), actions)
    is_path = isinstance(actions, str | os.PathLike)
    rate = 'learning_rate' if stage == 'pretrain' else 'finetune_learning_rate'
    given = {f'{stage}_epochs': epochs, 'patience': patience, rate: learning_rate}
    given |= {
        'replay': replay,
        'split_at': split_at,
        'progress': progress,
        'from': run,
        'workdir': folder,
    }
    given['append'] = os.fspath(actions) if is_path else 'frame'
    argv = [f'--{name}={value}' for name, value in given.items() if value is not None]
    context = stages.open_run(flags.parse(argv))
    with contextlib.closing(context):
        context.prints = progress != 'none'
        try:
            stages.STAGES['update'](context, None if is_path else actions)
            stages.STAGES['evaluate'](context)
        except Interrupted as error:
            raise KeyboardInterrupt(
                f'{error}; call update again with the same arguments to go on'
            ) from None
        return _read_result(context)


def _updated_folder(run: Path, actions: Any, up: int = 1) -> Path:
    """A folder beside the run, `up` levels above it, that is the same for the same actions."""
    data, min_rating = stages.read_data(str(run))
    digest = append.digest(append.read_like(actions, data, min_rating))
    above = run.absolute().parents[up - 1]
    name = run.absolute().parts[-up]
    return above / f'{name}_{digest[:8]}'


def evaluate(
    recommender: Recommender, data: Dataset, split: Literal['validation', 'test'] = 'test'
) -> Ranks:
    """Ranks every held-out item among all items.

    Args:
      recommender: of `fit` or `load`.
      data: users and their histories; items by the caller's ids.
      split: 'test', the last item of each user, or 'validation', the one before. Of data that are
        split by time (`data.split_by_time()`), the targets of that split.

    Returns:
      Ranks, int32 [U] in the order of data.user_ids for both protocols; of a split by time [R], in
      the order of data.split.parts[split].users.
      `fame_jax.evaluation.metrics.metrics(ranks.masked)` are HR, NDCG and MRR.

    Raises:
      UserError: when an item of the data is not in the recommender's catalogue.
      TypeError: when an argument has another type.
      ValueError: when there is no such split.
    """
    _check_types('evaluate', recommender=recommender, data=data)
    known, unknown = recommender.to_indices(data.item_ids[1:])
    if unknown:
        raise UserError(
            f'{len(unknown):,} items of the data are not in the catalogue, such as {unknown[0]!r}'
        )
    index_V = np.concatenate([[0], known]).astype(np.int32)
    starts, ends = data.history_bounds(split)
    model, items, number = recommender.model, index_V[data.items], len(ends)
    batches = EvalBatches(
        items, starts, ends, items[ends], model.max_length, min(EVAL_USERS, number)
    )
    return ranking.rank_users(
        model.encode,
        model.params,
        model.item_VD,
        batches,
        number,
        model.combine,
        num_items=recommender.num_items,
    )


def load(folder: str | Path) -> Recommender:
    """A recommender from a run's folder or from an export.

    Raises:
      UserError: when the folder is neither, or holds no trained model.
    """
    folder = Path(folder)
    if (folder / 'flags.cfg').is_file() or run_dir.several_runs(folder):
        # With a stage that only uses the run, so that its flags.cfg is not written.
        given = flags.Given({'workdir': str(folder), 'stages': ('recommend',)})
        return open_recommender(stages.open_run(given))
    if not folder.is_dir():
        raise UserError(f'{folder}: there is no such folder; give a run or an export')
    return export.load(folder)


def _check_types(function: str, **arguments: Any) -> None:
    """Names the right type of an argument that has another one."""
    expected = {
        'data': (Dataset, 'Dataset.from_frame(frame) or Dataset.from_file(path)'),
        'model': (ItemModel, 'a module such as FAME() or SASRec(width=128)'),
        'training': (Training, 'Training(pretrain_epochs=20)'),
        'recommender': (Recommender, 'fit(...).recommender or load(folder)'),
    }
    for name, value in arguments.items():
        kind, hint = expected[name]
        if not isinstance(value, kind):
            raise TypeError(f'{function}: {name} is a {type(value).__name__}; give {hint}')


def _check_seeds(training: Training) -> None:
    if isinstance(training.seeds, int):
        raise TypeError(f'fit: Training(seeds={training.seeds}) is one number; give a list of them')
    if not training.seeds:
        raise ValueError('fit: Training(seeds=...) names no seed; give one, such as [0]')
    if len(set(training.seeds)) < len(training.seeds):
        raise ValueError(f'fit: seeds={list(training.seeds)} names a seed twice; give each once')


def _fit(
    data: Dataset,
    model: ItemModel,
    training: Training,
    folders: Mapping[int, Path],
    parent: Path,
    progress: str,
) -> tuple[FitResult, ...]:
    """A run of each seed in a folder of its own: the stages from data to results.

    Runs of several seeds use the data in the folder of all.
    """
    several = len(folders) > 1
    argv = [
        f'--dataset={data.card.get("name", "data")}',
        f'--progress={progress}',
        *_split_flags(data),
        *training.flags(),
    ]
    with contextlib.ExitStack() as stack:

        def open_context(*more: str) -> stages.RunContext:
            context = stages.open_run(flags.parse([*argv, *more]), model)
            stack.enter_context(contextlib.closing(context))
            context.prints = progress != 'none'
            return context

        if several:
            of_data = open_context(f'--workdir={parent}', '--stages=prepare')
            _save_data(data, of_data)
            argv.append(f'--prepared={parent}')
        contexts = [
            open_context(f'--workdir={folder}', f'--seed={seed}')
            for seed, folder in folders.items()
        ]
        if not several:
            _save_data(data, contexts[0])
        wanted = [name for name in contexts[0].config.run.stages if name != 'prepare']
        try:
            members.run_stages(contexts, wanted, stages.STAGES)
            if several:
                table = members.write_results(parent, contexts)
                if progress != 'none':
                    print(table)
            return tuple(map(_read_result, contexts))
        except Interrupted as error:
            raise KeyboardInterrupt(
                f'{error}; call fit again with the same arguments to go on'
            ) from None


def _split_flags(data: Dataset) -> list[str]:
    """The split of the data as flags of a run."""
    if data.time_split is None:
        return []
    card = data.time_split.card
    return ['--split=time', f'--split_at={card["at"]}', f'--split_targets={card["targets"]}']


def _read_result(context: stages.RunContext) -> FitResult:
    """The result of a run that has been evaluated."""
    results = run_dir.read_json(context.folder / 'results.json')['results']
    of_stage = {
        name: {split: result[split] for split in ('validation', 'test')}
        for name, result in results.items()
    }
    final = [name for name in ('pretrain', 'finetune') if name in of_stage][-1]
    return FitResult(
        metrics=of_stage[final],
        deviations={},
        stages=of_stage,
        history=context.metrics.read(),
        workdir=context.folder,
        recommender=open_recommender(context),
    )


def _over_runs(statistic: Callable[[list[float]], float], runs: Sequence[Metrics]) -> Metrics:
    """A statistic of every metric over several runs."""
    return {
        split: {
            protocol: {
                name: statistic([run[split][protocol][name] for run in runs]) for name in row
            }
            for protocol, row in of_split.items()
        }
        for split, of_split in runs[0].items()
    }


def _folder_name(data: Dataset, model: ItemModel, training: Training) -> str:
    """A folder name that is the same for the same data, model and settings, and no others."""
    parts = [
        data.fingerprint(),
        settings.name_of(type(model)),
        registry.values(model),
        read_source(type(model)),
        training.flags(),
    ]
    digest = hashlib.sha256(json.dumps([*parts, list(training.seeds)], default=str).encode())
    return (
        f'{data.card.get("name", "data")}_{type(model).__name__.lower()}_{digest.hexdigest()[:8]}'
    )


def _save_data(data: Dataset, context: stages.RunContext) -> None:
    """Writes the data set into the run's folder, or checks that it is the one there."""
    if context.is_prepared:
        if context.data.card['fingerprint'] != data.fingerprint():
            raise UserError(
                f'{context.folder} holds a run on other data, or on another split of them; choose '
                'another workdir'
            )
        return
    save_data(context, data)
