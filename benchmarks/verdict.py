"""The verdict on finished runs: each model's figures over its seeds, and FAME against the others.

Every model's epoch, and the model FAME is tested against, are chosen on validation, never on test.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import published, significance
from benchmarks.runs import MODELS, Run
from fame_jax import evaluate as judge
from fame_jax import records
from fame_jax.errors import UserError

METRICS = tuple(f'{metric}@{k}' for metric in ('hr', 'ndcg') for k in judge.CUTOFFS)
TESTED = (10, 20)  # cut-offs of the NDCG that is tested for significance
SELECT_ON = 'ndcg@20'  # validation, masked


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """All that the table and the picture tell, of those runs that are done.

    Returns:
      A dict of plain values, for each data set with a finished run: its card, its rows (of them all
      metrics of both splits and protocols, per seed and their mean and standard deviation), the
      published rows, significance, and the runs that are missing.

    Raises:
      UserError: when two runs of a data set are of different data.
    """
    done: dict[str, list[Run]] = {}
    missing: dict[str, list[str]] = {run.dataset: [] for run in runs}
    for run in runs:
        if run.done():
            done.setdefault(run.dataset, []).append(run)
        else:
            missing[run.dataset].append(run.workdir.name)
    return {
        dataset: _dataset(dataset, done[dataset]) | {'missing': missing[dataset]}
        for dataset in missing
        if dataset in done
    }


def read(done: Sequence[Run]) -> dict[Run, Any]:
    """What results.json says of each finished run.

    Raises:
      UserError: when two of them are of different data.
    """
    told = {run: records.read_json(run.workdir / 'results.json') for run in done}
    prints = {run: found['card']['dataset']['fingerprint'] for run, found in told.items()}
    for run in done:
        if prints[run] != prints[done[0]]:
            raise UserError(
                f'{run.workdir} and {done[0].workdir} are of different data; remove one of them'
            )
    return told


def _dataset(dataset: str, done: Sequence[Run]) -> dict[str, Any]:
    told = read(done)
    of_model: dict[str, dict[Run, Any]] = {model: {} for model in MODELS}
    for run in sorted(done, key=lambda run: run.seed):
        of_model[run.model][run] = told[run]
    rows = [row_of(model, found) for model, found in of_model.items() if found]
    return {
        'card': told[done[0]]['card']['dataset'],
        'popularity': told[done[0]]['results']['popularity']['test'],
        'rows': rows,
        'published': {
            protocol: {r['model']: published.rows(r['model'], dataset, protocol) for r in rows}
            for protocol in judge.PROTOCOLS
        },
        'significance': against_others(done, {r['model']: chosen_by(r) for r in rows}),
    }


def row_of(model: str, found: Mapping[Run, Any]) -> dict[str, Any]:
    """A model's figures over its seeds, of one run each, as `read` has them."""
    stage = MODELS[model].stage
    results = [told['results'][stage] for told in found.values()]
    about = [told['card']['stages'][stage] for told in found.values()]
    seconds = [one['seconds'] for one in about]
    backbones = [_backbone_seconds(run) for run in found]
    return {
        'model': model,
        'title': MODELS[model].title,
        'label': results[0]['model'],
        'stage': stage,
        'seeds': [run.seed for run in found],
        **{
            split: {
                protocol: {m: spread([r[split][protocol][m] for r in results]) for m in METRICS}
                for protocol in judge.PROTOCOLS
            }
            for split in ('validation', 'test')
        },
        'seconds': spread(seconds),
        'seconds_with_backbone': None
        if None in backbones
        else spread([own + before for own, before in zip(seconds, backbones)]),
        'epochs': [one['epochs'] for one in about],
        'best_epochs': [one['best_epoch'] for one in about],
        'parameters': about[0]['parameters'],
        'machines': [one['machine'] for one in about],
        **_commands(found),
    }


def _commands(runs: Iterable[Run]) -> dict[str, Any]:
    """How the runs were started, as `start_child` wrote it down; [] of those begun by hand."""
    paths = [run.workdir / 'command.json' for run in runs]
    told = [records.read_json(path) for path in paths if path.is_file()]
    return {
        'commands': [one['command'] for one in told],
        'jobs': max((one['jobs'] for one in told), default=1),
        'load': max((one['load'] for one in told), default=0.0),
    }


def _backbone_seconds(run: Run) -> float | None:
    """Seconds that its backbone was trained; None if it has none, or that is gone."""
    path = run.needs / 'results.json' if run.needs else None
    if path is None or not path.is_file():
        return None
    return records.read_json(path)['card']['stages']['pretrain']['seconds']


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (ddof 1; None of one value), and the values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {'mean': float(np.mean(values)), 'sd': sd, 'values': list(values)}


def chosen_by(row: Mapping[str, Any]) -> float:
    """What models are selected on: validation NDCG@20, masked, mean over seeds."""
    return row['validation']['masked'][SELECT_ON]['mean']


def against_others(done: Sequence[Run], selected_on: Mapping[str, float]) -> dict[str, Any] | None:
    """FAME against every other model: paired over users, each user's NDCG averaged over seeds.

    Users are what is drawn again; that another seed trains another model is in the standard
    deviations of the rows and not here.

    Args:
      done: finished runs of one data set.
      selected_on: model -> its figure on validation, by which the best other model is chosen.

    Returns:
      best_other (of the models that are not FAME themselves), and protocol -> metric -> other model
      -> seeds, users, both means, difference, low and high of its bootstrapped 95 % interval, and
      p of Wilcoxon's signed-rank test. None without FAME or without another of the same seeds.
    """
    of_model: dict[str, dict[int, Run]] = {}
    for run in done:
        of_model.setdefault(run.model, {})[run.seed] = run
    ours = of_model.pop('fame', {})
    shared = {name: sorted({*ours} & {*runs}) for name, runs in of_model.items()}
    shared = {name: shared[name] for name in MODELS if shared.get(name)}
    baselines = [name for name in shared if not MODELS[name].backbone]
    if not baselines:
        return None
    return {
        'best_other': max(baselines, key=lambda name: selected_on[name]),
        'chosen_by': f'validation {SELECT_ON}, masked',
        'resamples': significance.RESAMPLES,
        **{protocol: _tests(ours, of_model, shared, protocol) for protocol in judge.PROTOCOLS},
    }


def _tests(
    ours: Mapping[int, Run],
    of_model: Mapping[str, Mapping[int, Run]],
    shared: Mapping[str, Sequence[int]],
    protocol: str,
) -> dict[str, Any]:
    """Metric -> other model -> the comparison."""
    our_ranks = {seed: run.ranks(protocol) for seed, run in ours.items()}
    cases, pairs = [], []
    for name, seeds in shared.items():
        their_ranks = {seed: of_model[name][seed].ranks(protocol) for seed in seeds}
        for k in TESTED:
            our_U, their_U = (
                significance.mean_gain([ranks[seed] for seed in seeds], k)
                for ranks in (our_ranks, their_ranks)
            )
            cases.append((f'ndcg@{k}', name))
            pairs.append((our_U, their_U))
    found: dict[str, Any] = {f'ndcg@{k}': {} for k in TESTED}
    for (metric, name), test in zip(cases, significance.comparisons(pairs)):
        found[metric][name] = {'seeds': list(shared[name])} | test
    return found
