"""The jobs of benchmarks.campaign and their order."""

import itertools
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fame_jax import run_dir
from fame_jax.config import binds
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import show, suggest
from fame_jax.errors import UserError
from fame_jax.models import registry
from fame_jax.stages import settings

Record = dict[str, Any]

DATASETS = ('toys', 'beauty', 'sports', 'ml-1m-full')
# Models with branches take as many times as long as they have branches; --models names them.
MODELS = (
    *('fame', 'causal_bsarec', 'causal_tvrec', 'hstu', 'esasrec', 'last_item', 'history_mean'),
    *('gru4rec', 'sasrec_bce', 'sasrec_sampled', 'core', 'cl4srec', 'duorec', 'iclrec'),
    *('atten_mixer', 'msgifsr', 'miasrec', 'fame_bert4rec'),
)
# SASRec as in its own paper, and with a sampled softmax; as in experiments/table2.sh.
VARIANTS = {
    'sasrec_bce': '--model=sasrec --loss=bce --num_negatives=1 --similarity=dot '
    '--positions=start --pretrain_epochs=300 --patience=25',
    'sasrec_sampled': '--model=sasrec --loss=sampled --num_negatives=256',
}
OWN_FLAGS = (
    *('dataset', 'data_dir', 'prepared', 'model', 'workdir', 'seed', 'seeds', 'stages', 'out'),
    'distributed',
)


class Job(NamedTuple):
    """The preparation of a data set, or a model on it with all seeds.

    Fields:
      name: DATASET/data or DATASET/MODEL.
      flags: of fame_jax.main, but for folders.
      left_out: flags of the data set's file or of --flags that are not for this model.
    """

    name: str
    flags: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """The name of the job that prepares the data."""
        return f'{self.name.partition("/")[0]}/data'

    def argv(self, out: Path, data_dir: str) -> list[str]:
        """The arguments of fame_jax.main."""
        if self.name == self.data:
            folders = [f'--workdir={out / "data" / self.name.partition("/")[0]}']
            folders += [f'--data_dir={data_dir}'] if data_dir else []
        else:
            folders = [f'--workdir={out / "runs" / self.name}']
            folders += [f'--prepared={out / "data" / self.name.partition("/")[0]}']
        return [*self.flags, *folders]


def list_jobs(
    models: Sequence[str],
    datasets: Sequence[str],
    seeds: str,
    extra: Sequence[str] = (),
    only: str = '',
) -> list[Job]:
    """The jobs, models in the outer order, and before them the preparation of each data set.

    Args:
      models: names of the registry and of VARIANTS.
      datasets: as of --dataset.
      seeds: as of --seeds.
      extra: more flags of all jobs.
      only: a regular expression; others than the names DATASET/MODEL that it matches are left out.

    Raises:
      UserError: for an unknown name, or a flag that no job can have.
    """
    for model in models:
        if model not in (known := (*registry.MODELS, *VARIANTS)):
            raise UserError(f'--models={model}: there is no such model; {suggest(model, known)}')
    for argument in extra:
        if (name := argument.lstrip('-').partition('=')[0]) in OWN_FLAGS:
            raise UserError(f'--flags: --{name} is set for each job; leave it out')
    names = {Path(dataset).name.split('.')[0]: dataset for dataset in datasets}
    if len(names) < len(datasets):
        raise UserError(f'--datasets={",".join(datasets)}: two have the same name; rename one')
    try:
        pairs = [(d, m) for m in models for d in names if re.search(only, f'{d}/{m}')]
    except re.error as error:
        raise UserError(f'--only={only} is no regular expression: {error}') from error
    # The backbone of a FAME is a row of its run.
    fames = {'sasrec': 'fame', 'bert4rec': 'fame_bert4rec', 'branched_sasrec': 'branched_fame'}
    pairs = [(d, m) for d, m in dict.fromkeys(pairs) if (d, fames.get(m)) not in pairs]
    if not pairs:
        raise UserError('no job is left; --models, --datasets and --only choose them')
    jobs, refusals = {}, []
    for data, model in pairs:
        of_data, flags, refused = _choose_flags(model, data, names[data], extra)
        jobs[f'{data}/data'] = Job(f'{data}/data', ('--stages=prepare', *of_data))
        name = f'{data}/{model}'
        jobs[name] = Job(name, (*flags, f'--seeds={seeds}'), tuple(refused))
        refusals.append({text.partition('=')[0]: reason for text, reason in refused.items()})
    for name in config_flags.parse(extra).values:
        if all(f'--{name}' in refused for refused in refusals):
            raise UserError(f'--flags: no job can have --{name}: {refusals[0][f"--{name}"]}')
    return list(jobs.values())


def _choose_flags(
    model: str, data: str, dataset: str, extra: Sequence[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """The flags of the data, those of a job, and those left out with the reason."""
    file = config_flags.packaged_files().get(f'{data}.cfg')
    of_file = [f'--flagfile={file}'] if file else []
    own = [*shlex.split(VARIANTS.get(model, f'--model={model}')), *extra]
    given = config_flags.parse(own).values
    kind = registry.find(given['model'])
    of_data, waiting, refused = [f'--dataset={dataset}'], [], {}
    for name, value in config_flags.parse([*of_file, *own]).values.items():
        text = f'--{name}={show(value)}'
        if name in OWN_FLAGS:
            continue
        if binds(name) == 'data':
            of_data.append(text)
        elif name in kind.recipe and name not in given:
            refused[text] = "the model's recipe sets it"
        elif binds(name) == 'finetune' and not kind.backbone:
            refused[text] = 'the model has no stage finetune'
        else:
            waiting.append(text)
    kept, nowhere = [f'--model={given["model"]}'], f'--workdir={tempfile.gettempdir()}/no/run'

    def refuse(*texts: str) -> str:
        """The reason why the job cannot have these flags too; '' where it can."""
        try:
            settings.complete(config_flags.parse([*of_data, nowhere, *kept, *texts]))
        except UserError as error:
            return str(error)
        return ''

    while True:
        # Two at a time, since some flags need another one, as a loss its number of negatives.
        rest = [text for text in waiting if text not in kept]
        groups = (group for size in (1, 2) for group in itertools.combinations(rest, size))
        group = next((group for group in groups if not refuse(*group)), ())
        if not group:
            return of_data, kept, refused | {text: refuse(text) for text in rest}
        kept += group


def progress(folder: Path) -> tuple[int, int]:
    """How far a job is: seeds with results, and lines of their logs."""
    seeds = list(folder.glob('seed_*'))
    lines = [len(run_dir.Metrics(seed / 'metrics.jsonl').read()) for seed in seeds]
    return sum((seed / 'results.json').is_file() for seed in seeds), sum(lines)


def order(jobs: Sequence[Job], out: Path, records: Mapping[str, Record]) -> list[Job]:
    """The jobs that are not done, the least finished first and those that have failed last.

    The preparation of a data set is placed before its first job.

    Args:
      jobs: as `list_jobs` returns them.
      out: the campaign's folder.
      records: of an earlier call, by name.
    """

    def is_done(job: Job) -> bool:
        record, is_data = records.get(job.name, {}), job.name == job.data
        place = out / 'data' / job.name.split('/')[0] if is_data else out / 'runs' / job.name
        made = 'dataset/dataset.json' if is_data else run_dir.SEEDS
        same = record.get('flags') == list(job.flags) and record['state'] == 'done'
        return same and (place / made).is_file()

    def key(job: Job) -> tuple[bool, int, int]:
        failed = records.get(job.name, {}).get('state') == 'failed'
        return failed, *progress(out / 'runs' / job.name)

    waiting = [job for job in jobs if not is_done(job)]
    of_data = {job.name: job for job in waiting if job.name == job.data}
    ordered: dict[str, Job] = {}
    for job in sorted((job for job in waiting if job.name != job.data), key=key):
        if job.data in of_data:
            ordered.setdefault(job.data, of_data[job.data])
        ordered[job.name] = job
    return list(ordered.values())
