"""Tables over models and seeds, from the results.json of any number of runs, as Markdown and JSON.

    python -m fame_jax.report.tables runs/*/results.json --against=FAME --out=runs

A RUN is a folder with results.json, and ranks.npz for the paired tests; the folder of several
seeds, which stands for all of them; or a JSON file with the contents of one results.json, of
several by name, or of an earlier tables.json. Runs of one data set and one split make one table for
each protocol: mean and sample standard deviation over seeds, next to the figures that other authors
printed. Nothing is selected on test figures.
"""

import argparse
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fame_jax import run_dir
from fame_jax.config import FLAGS
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.evaluation import lists, significance
from fame_jax.evaluation.metrics import PROTOCOLS
from fame_jax.report import published
from fame_jax.report.collect import limit_lines
from fame_jax.report.markdown import markdown

Tables = dict[str, Any]  # plain values, as `collect` returns them

SPLITS = ('validation', 'test')
METRICS = published.COLUMNS
TESTED = (10, 20)  # cut-offs of the NDCG of the paired tests
BACKBONES = {'fame': 'sasrec', 'fame_bert4rec': 'bert4rec'}
# Settings that the runs of one row should share. Those of the model are part of the row's title,
# and those of the data are covered by its fingerprint.
COMPARED = (
    *('max_length', 'long_histories', 'loss', 'num_negatives', 'negatives', 'loss_chunk'),
    *('row_length', 'rows_per_step', 'learning_rate', 'weight_decay', 'dtype'),
    *('future_targets', 'finetune_future_targets', 'seen_weight', 'ema', 'schedule'),
    *('warmup_epochs', 'finetune_dropout'),
    *('pretrain_epochs', 'patience', 'select_on', 'validation_users'),
    *('finetune_epochs', 'finetune_learning_rate'),
    *('text_fields', 'facets', 'text_encoder', 'text_options'),
    *('item_init', 'item_scale', 'unseen_items', 'text_path', 'text_path_below'),
)


class Result(NamedTuple):
    """One trained model of one run.

    Fields:
      run: name of the run.
      folder: the folder with ranks.npz; None: there is none.
      stage: that trained the model.
      title: model and settings; runs of one title are seeds of one row.
      model: as in published.py.
      seed: of the run.
      config: the run's settings by flag name.
      dataset: the data set's card.
      metrics: split -> protocol -> metric; `lists` and, after an order test, `shuffled` likewise.
      training: epochs, best_epoch, seconds, parameters and machine.
      select_on: the protocol by which the best epoch was selected.
      repeats: the share of the test targets that stand in their history; 0 where it is not known.
      limits: a line if the stage ended at its limit of epochs.
      time_split: moment, targets and counts of a split by time; None: leave one out.
    """

    run: str
    folder: Path | None
    stage: str
    title: str
    model: str
    seed: int
    config: dict[str, Any]
    dataset: dict[str, Any]
    metrics: dict[str, Any]
    training: dict[str, Any]
    select_on: str = 'masked'
    repeats: float = 0.0
    limits: tuple[str, ...] = ()
    time_split: Mapping[str, Any] | None = None

    @property
    def table(self) -> str:
        """The name of the run's table: its data set and, if it is by time, its split."""
        return table_name(self.dataset['name'], self.time_split)

    def ranks(self, protocol: str) -> np.ndarray | None:
        """The rank of each user's test item, int32 [U]; None where there is no ranks.npz.

        Raises:
          UserError: when the file cannot be read.
        """
        path = self.folder and self.folder / 'ranks.npz'
        if not path or not path.is_file():
            return None
        try:
            with explain_os_errors(f'reading {path}'), np.load(path) as ranks:
                return ranks[f'{self.stage}/test/{protocol}']
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{path} has no ranks of {self.stage}; run evaluate again') from error


def table_name(dataset: str, time_split: Mapping[str, Any] | None) -> str:
    """The name of the table of a data set under a split."""
    if not time_split:
        return dataset
    return f'{dataset}, split by time at {time_split["moment"]}, {time_split["targets"]}'


def _seeds_apart(paths: Iterable[Path]) -> Iterator[Path]:
    """The paths, with the runs of its seeds in the place of a folder of several seeds."""
    for path in paths:
        folder = path.parent if path.name == run_dir.SEEDS else path
        seeds = [] if (folder / 'results.json').exists() else run_dir.seed_folders(folder)
        yield from seeds or [path]


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Result], dict[str, Any]]:
    """The trained models of several runs in their order, and by table the baselines by name.

    Raises:
      UserError: when a file is missing or was not written by the stage evaluate.
    """
    results: list[Result] = []
    baselines: dict[str, dict[str, Any]] = {}
    for path in _seeds_apart(map(Path, paths)):
        path = path.parent if path.name == 'results.json' else path
        folder = None if path.suffix == '.json' else path
        content = run_dir.read_json(path / 'results.json' if folder else path)
        runs = {path.name.removesuffix('.json'): content} if 'results' in content else content
        for name, run in runs.items():
            try:
                card, stages = run['card'], run['results']
                time_split = card.get('time_split')
                of_data = baselines.setdefault(table_name(card['dataset']['name'], time_split), {})
                of_data.setdefault('popularity', stages['popularity'])
                if 'item_graph' in stages:  # since version 0.3, and not of the largest data
                    of_data.setdefault('item_graph', stages['item_graph'])
                results += [
                    Result(
                        run=name,
                        folder=folder,
                        stage=stage,
                        title=stages[stage]['model'],
                        model=published_name(card['config'], stage),
                        seed=card['seed'],
                        config=card['config'],
                        dataset=card['dataset'],
                        metrics=stages[stage],
                        training=card['stages'][stage],
                        select_on=card.get('select_on', 'masked'),
                        repeats=card.get('repeats', {}).get('test', 0.0),
                        limits=tuple(limit_lines(card, stage)),
                        time_split=time_split,
                    )
                    for stage in ('pretrain', 'finetune')
                    if stage in stages
                ]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f'{path}: {name} has no {error}; it was not written by the stage evaluate'
                ) from error
    return results, baselines


def published_name(settings: Mapping[str, Any], stage: str) -> str:
    """The name in published.py of the model that a stage trained, from the run's settings."""
    model = settings['model']
    model = BACKBONES.get(model, model) if stage == 'pretrain' else model
    if model == 'sasrec' and settings['loss'] != 'ce':
        model = f'sasrec_{settings["loss"]}'
    return f'{model}_plus' if settings['item_init'] == 'text' else model


def collect(
    results: Sequence[Result],
    baselines: Mapping[str, Mapping[str, Any]],
    against: str = '',
    with_published: bool = True,
) -> Tables:
    """The figures of every data set under every split of it.

    Args:
      results: as `read_runs` returns them.
      baselines: by table, the metrics of what is not trained, by 'popularity' and 'item_graph'.
      against: the row that all others are tested against, by its title (with or without its
        settings) or model; '': no tests.
      with_published: whether the figures of other authors are included.

    Returns:
      A dict of plain values: datasets, one for each data set and split, each with its card, rows,
      published rows, tests and notes.

    Raises:
      UserError: when runs of one data set have different data, or `against` is not a single row.
    """
    tables = {}
    for name in dict.fromkeys(result.table for result in results):
        of_data = [result for result in results if result.table == name]
        first = of_data[0]
        dataset, by_time = first.dataset['name'], first.time_split
        for other in of_data:
            if other.dataset['fingerprint'] != first.dataset['fingerprint']:
                raise UserError(
                    f'{other.run} and {first.run} are both of {name} and have different data'
                )
        groups, notes = _group(of_data)
        notes += [
            f'{one.title}, seed {one.seed}: {line}'
            for group in groups.values()
            for one in group
            for line in one.limits
        ]
        if len({one.select_on for group in groups.values() for one in group}) > 1:
            notes.append('best epochs were selected by the masked ranking in some runs only')
        rows = [
            {'model': baseline, 'title': figures['model'], 'seeds': [], 'machines': []}
            | _figures([figures])
            for baseline, figures in baselines[name].items()
        ]
        rows += map(_row, groups.values())
        # Other authors printed figures of leave one out.
        compares = with_published and not by_time
        models = dict.fromkeys(row['model'] for row in rows) if compares else {}
        tables[name] = {
            'card': first.dataset,
            **({'time_split': by_time} if by_time else {}),
            'select_on': first.select_on,
            'repeats': first.repeats,
            'rows': rows,
            'published': {
                protocol: {
                    model: [row._asdict() for row in published.rows(model, dataset, protocol)]
                    for model in models
                }
                for protocol in PROTOCOLS
            },
            'tests': _tests(groups, against, notes) if against else [],
            'notes': notes,
        }
    return {'datasets': tables}


def _group(results: Sequence[Result]) -> tuple[dict[str, list[Result]], list[str]]:
    """Results by title, each seed once; notes on omitted runs and on settings that differ."""
    groups: dict[str, list[Result]] = {}
    notes = []
    for result in results:
        group = groups.setdefault(result.title, [])
        same = next((one for one in group if one.seed == result.seed), None)
        if same:
            notes.append(
                f'{result.title}, seed {result.seed}: taken from {same.run}, not from {result.run}'
            )
        else:
            group.append(result)
    for title, group in groups.items():
        for name in COMPARED:
            # An earlier version lacks some flags, which then had their defaults.
            values = {str(one.config.get(name, FLAGS[name].default)): None for one in group}
            unused = group[0].stage == 'pretrain' and name.startswith('finetune_')
            if len(values) > 1 and not unused:
                notes.append(f'{title}: its runs differ in {name} ({", ".join(values)})')
    return groups, notes


def _row(group: Sequence[Result]) -> dict[str, Any]:
    """The figures of one model over its seeds."""
    group = sorted(group, key=lambda result: result.seed)
    training = [result.training for result in group]
    return {
        'model': group[0].model,
        'title': group[0].title,
        'seeds': [result.seed for result in group],
        **_figures([result.metrics for result in group]),
        'seconds': spread([one['seconds'] for one in training]),
        'epochs': [one['epochs'] for one in training],
        'best_epochs': [one['best_epoch'] for one in training],
        'parameters': training[0]['parameters'],
        'machines': list(dict.fromkeys(_machine(one['machine']) for one in training)),
    }


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Split -> protocol -> metric -> its spread over runs; lists and shuffled where all have it."""
    parts = {split: METRICS for split in SPLITS}
    parts |= {'lists': lists.COLUMNS, 'shuffled': METRICS}
    return {
        part: {
            protocol: {
                metric: spread([run[part][protocol][metric] for run in runs]) for metric in names
            }
            for protocol in PROTOCOLS
            if all(protocol in run[part] for run in runs)
        }
        for part, names in parts.items()
        if all(part in run for run in runs)
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (ddof 1; None of one value), and the values."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {'mean': float(np.mean(values)), 'sd': sd, 'values': list(values)}


def _machine(machine: Mapping[str, Any]) -> str:
    device = machine['device']
    versions = ', '.join(f'{name} {machine["versions"][name]}' for name in ('python', 'jax'))
    return (
        f'{device["count"]} x {device["kind"]}, {machine["cores"]} cores, {versions}, '
        f'fame_jax {machine["code"]}, {machine["date"]}'
    )


def _tests(
    groups: Mapping[str, Sequence[Result]], against: str, notes: list[str]
) -> list[dict[str, Any]]:
    """Every row against one, paired over users; a user's NDCG is the mean over shared seeds."""
    names = {t: (t, t.split(' (')[0], group[0].model) for t, group in groups.items()}
    chosen = [title for title in groups if against in names[title]]
    if len(chosen) != 1:
        raise UserError(
            f'--against={against} names {len(chosen)} rows; give one of {", ".join(groups)}'
        )
    (first,) = chosen
    ours = {result.seed: result for result in groups[first]}
    tests, pairs = [], []
    for second, group in groups.items():
        theirs = {result.seed: result for result in group}
        seeds = sorted({*ours} & {*theirs})
        for protocol in PROTOCOLS if second != first else ():
            ranks = [[of[s].ranks(protocol) for s in seeds] for of in (ours, theirs)]
            if not seeds or any(r is None for of in ranks for r in of):
                notes.append(f'{second} is not tested against {first}: no ranks of one seed')
                break
            for k in TESTED:
                tests.append({'first': first, 'second': second, 'protocol': protocol})
                tests[-1] |= {'metric': f'ndcg@{k}', 'seeds': seeds}
                pairs.append(tuple(significance.mean_ndcg(of, k) for of in ranks))
    for test, result in zip(tests, significance.paired_tests(pairs)):
        values = result._asdict()
        # The names first and second are those of the rows.
        test |= {'first_mean': values.pop('first'), 'second_mean': values.pop('second'), **values}
    return tests


def main(argv: Sequence[str]) -> int:
    """Reads, prints and writes; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='+', metavar='RUN')
    parser.add_argument('--against', default='', help='title or model of the row of paired tests')
    parser.add_argument('--no_published', action='store_true', help='only our own figures')
    parser.add_argument('--out', type=Path, help='folder for tables.md and tables.json')
    options = parser.parse_args(argv)
    try:
        first = Path(options.runs[0])
        tables = run_dir.read_json(first) if first.suffix == '.json' else {}
        if 'datasets' not in tables:
            runs = read_runs(options.runs)
            tables = collect(*runs, options.against, not options.no_published)
        print(markdown(tables), end='')
        if options.out:
            with explain_os_errors(f'making the folder {options.out}', 'choose another --out'):
                options.out.mkdir(parents=True, exist_ok=True)
            run_dir.write_json(options.out / 'tables.json', tables)
            run_dir.write_text(options.out / 'tables.md', markdown(tables))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
