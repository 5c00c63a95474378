"""The record that the page of a run shows, collected from the files in the run's folder."""

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import run_dir
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.evaluation import groups
from fame_jax.evaluation.metrics import PROTOCOLS, log_name

TRAINED = ('pretrain', 'finetune')  # stages with a model, in order
# Errors of numpy on a damaged archive.
DAMAGED = (
    *(ValueError, KeyError, OSError, EOFError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
SELECTION = 'ndcg@20'  # metric on the validation split by which the best epoch is selected


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """Results that the paper printed for one model."""

    model: str
    metrics: Mapping[str, float]
    remarks: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Curves:
    """Losses and the validation metric of one stage, each as (epoch, value) in order."""

    stage: str
    lines: Mapping[str, Sequence[tuple[int, float]]]
    best_epoch: int | None


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Test targets in groups by one property; rows as `groups.group_metrics` returns them."""

    by: str
    rows: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One test user: the rule that selected them and the explanation in its JSON form."""

    rule: str
    user: str
    explanation: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What the page of a run shows. Empty fields leave their section out.

    Attributes:
      stage: the last stage with results; its model is the subject of the page.
      card: the protocol card of results.json.
      results: stage ('popularity' and 'item_graph' too) -> 'model', its name; 'test', and
        'shuffled' after an order test, protocol -> metrics; 'lists', protocol -> metrics of
        recommended lists.
      ranks: stage -> protocol -> int [R], the rank of each test target.
      paper: stage -> the paper's results for that model.
      curves: of each stage that logged epochs.
      groupings: test metrics by length of the history and by popularity of the target.
      facets: column title -> agreement of heads and facets, as `facet_probe.compare` returns it.
      item_map: the SVG file of the items in the plane.
      flags: flags.cfg.
      heads: use of heads and experts in a sample of users, as `groups.usage` returns it.
      cases: single test users and their explanations.
      has_titles: whether the items of the cases have titles.
    """

    stage: str
    card: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    ranks: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    paper: Mapping[str, PaperRow] = dataclasses.field(default_factory=dict)
    curves: Sequence[Curves] = ()
    groupings: Sequence[Grouping] = ()
    facets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    item_map: str = ''
    flags: str = ''
    heads: Mapping[str, Any] | None = None
    cases: Sequence[Case] = ()
    has_titles: bool = False

    @property
    def names(self) -> dict[str, str]:
        """The model's name of each stage."""
        return {stage: of_stage['model'] for stage, of_stage in self.results.items()}

    @property
    def protocol(self) -> str:
        """The protocol by which the model's best epoch was selected."""
        return self.card.get('select_on', 'masked')

    @property
    def other_protocol(self) -> str:
        """The other of the two protocols."""
        return next(protocol for protocol in PROTOCOLS if protocol != self.protocol)

    @property
    def version(self) -> str:
        """The version of fame_jax that evaluated the run."""
        machines = [value for value in self.card.values() if isinstance(value, Mapping)]
        return next((machine['code'] for machine in machines if 'code' in machine), '')

    def metrics(self, stage: str, protocol: str) -> Mapping[str, float]:
        """Test metrics of one stage under one protocol."""
        return self.results[stage]['test'][protocol]


def collect(
    folder: Path,
    data: Dataset | None = None,
    paper: Mapping[str, PaperRow] | None = None,
) -> RunReport:
    """Reads the record from a run's folder, without `heads` and `cases`, which need the model.

    Args:
      folder: the run's folder; only results.json must be in it.
      data: the run's data set; without it there are no groups of users.
      paper: stage -> the paper's results for that model.

    Raises:
      UserError: when the run has no results, or they belong to other data, or ranks.npz is broken.
    """
    path = folder / 'results.json'
    if not path.is_file():
        raise UserError(f'{folder} has no results; run --stages=evaluate first')
    card, results = run_dir.read_results(folder)
    stage = next((stage for stage in reversed(TRAINED) if stage in results), '')
    if not stage:
        raise UserError(f'{path} has no metrics of a trained model; run --stages=evaluate again')
    if data is not None and card['dataset']['fingerprint'] != data.card['fingerprint']:
        raise UserError(
            f'{path} belongs to other data than {folder} uses now; run --stages=evaluate again'
        )
    ranks = _read_ranks(folder / 'ranks.npz', results)
    return RunReport(
        stage=stage,
        card=card,
        results=results,
        ranks=ranks,
        paper={name: row for name, row in (paper or {}).items() if name in results},
        curves=_curves(run_dir.Metrics(folder / 'metrics.jsonl').read(), card),
        groupings=group_users(data, ranks) if data is not None and ranks else (),
        facets=_facets(folder, results),
        item_map=_read_text(folder / 'items.svg'),
        flags=_read_text(folder / 'flags.cfg'),
    )


def count_targets(card: Mapping[str, Any]) -> int:
    """The test targets of a protocol card: one of each user, or those of a split by time."""
    by_time = card.get('time_split')
    return by_time['test']['targets'] if by_time else card['dataset']['users']


def limit_lines(card: Mapping[str, Any], only: str = '') -> list[str]:
    """A line for each stage that ended at its limit of epochs and not by --patience.

    An update has none: its few epochs are meant, over which the rate falls to zero.

    Args:
      card: the protocol card.
      only: a stage; '': all stages.
    """
    lines, config = [], card.get('config', {})
    if config.get('append'):
        return lines
    for stage, of_stage in card.get('stages', {}).items():
        limit, epochs = config.get(f'{stage}_epochs'), of_stage.get('epochs')
        best = of_stage.get('best_epoch')
        if only in ('', stage) and limit and epochs and limit <= epochs < best + config['patience']:
            which = f'best epoch {best}' if best else 'none better than before training'
            which += ', still improving' if best == epochs else ''
            lines.append(
                f'{stage} ended at its limit of {limit} {"epoch" if limit == 1 else "epochs"} '
                f'({which}) and not by patience ({config["patience"]}); more epochs may give '
                'better figures.'
            )
    return lines


def _read_text(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def _read_ranks(path: Path, results: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Test ranks by stage and protocol; empty without the file."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {
                stage: {protocol: file[f'{stage}/test/{protocol}'] for protocol in PROTOCOLS}
                for stage in results
            }
    except DAMAGED as error:
        raise UserError(f'{path} cannot be read ({error}); run --stages=evaluate again') from error


def _curves(log: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> list[Curves]:
    """Losses, and after them the validation metric, of each stage by epoch.

    A resumed run may log an epoch twice; the later line counts.
    """
    stages: dict[str, dict[str, dict[int, float]]] = {}
    selected = log_name(SELECTION, card.get('select_on', 'masked'))
    for entry in log:
        lines = stages.setdefault(str(entry.get('stage')), {})
        for name, value in entry.items():
            of_selection = (name, entry.get('split')) == (selected, 'validation')
            shown = name.startswith('loss') or of_selection
            if shown and isinstance(value, int | float) and isinstance(entry.get('epoch'), int):
                lines.setdefault(_curve_name(name), {})[entry['epoch']] = value
    return [
        Curves(
            stage,
            {
                name: sorted(lines[name].items())
                for name in sorted(lines, key=lambda name: not name.startswith('loss'))
            },
            card.get('stages', {}).get(stage, {}).get('best_epoch'),
        )
        for stage, lines in stages.items()
        if lines
    ]


def _curve_name(name: str) -> str:
    """A metric's name on the page; 'loss/1_brand', the loss of facet 1, becomes 'loss brand'."""
    if name.endswith(SELECTION):
        return f'validation {SELECTION.upper()}'
    return 'loss ' + name.partition('_')[2] if '/' in name else name


def group_users(data: Dataset, ranks: Mapping[str, Mapping[str, np.ndarray]]) -> list[Grouping]:
    """Test users by length of their history and by popularity of their target.

    Args:
      data: the prepared data set.
      ranks: of any models by name, as `groups.group_metrics` takes them.
    """
    trained, _ = data.training_histories()
    starts, ends = data.history_bounds('test')
    count_U = np.bincount(trained, minlength=data.num_items + 1)[data.items[ends]]
    parts = {
        'length of history': groups.by_quantile(ends - starts),
        'popularity of the target': groups.by_popularity(count_U),
    }
    return [Grouping(by, groups.group_metrics(part, ranks)) for by, part in parts.items()]


def _facets(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement of heads and facets, before and after text training (FAME+) and at the end."""
    final = results.get('finetune', {}).get('facets')
    if not final:
        return {}
    path = folder / 'text' / 'text.json'
    probes = run_dir.read_json(path).get('probes', {}) if path.is_file() else {}
    stages = {f'text, {when}': probes[when] for when in ('before', 'after') if when in probes}
    return stages | {'fine-tuned': final}
