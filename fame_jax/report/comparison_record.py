"""The record of a comparison: what `fame_jax compare` shows, without how it is read or drawn."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax.evaluation import significance
from fame_jax.report.collect import SELECTION, Grouping, RunReport, count_targets
from fame_jax.report.tables import spread

UNTRAINED = ('popularity', 'item_graph')


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, or the runs of several seeds, which count as one.

    Attributes:
      name: the folder's, or its path where another run has that name.
      folder: of the run, or of all its seeds.
      reports: the record of each seed.
    """

    name: str
    folder: Path
    reports: tuple[RunReport, ...]

    @property
    def first(self) -> RunReport:
        """The record of the first seed."""
        return self.reports[0]

    @property
    def stage(self) -> str:
        """The last stage with results, whose model is compared."""
        return self.first.stage

    @property
    def model(self) -> str:
        """The model and its settings."""
        return self.first.names[self.stage]

    @property
    def seeds(self) -> list[Any]:
        """The seed of each record."""
        return [report.card.get('seed') for report in self.reports]

    def spread(self, *path: str, stage: str = '') -> dict[str, Any] | None:
        """Mean, deviation and values over seeds of a figure, such as ('test', 'masked', 'mrr').

        None where a seed lacks it.
        """
        values = []
        for report in self.reports:
            found: Any = report.results.get(stage or self.stage, {})
            for name in path:
                found = found.get(name) if isinstance(found, Mapping) else None
            values.append(found)
        return spread(values) if all(isinstance(v, int | float) for v in values) else None

    def ranks(self, protocol: str, stage: str = '') -> np.ndarray | None:
        """Test ranks of every seed, int [S, U]; None where a seed has no ranks.npz."""
        found = [report.ranks.get(stage or self.stage, {}) for report in self.reports]
        if any(protocol not in of_stage for of_stage in found):
            return None
        return np.stack([of_stage[protocol] for of_stage in found])


@dataclasses.dataclass(frozen=True)
class Test:
    """A run's NDCG@10 minus that of the reference.

    Attributes:
      interval: paired over users, of the means over seeds.
      each: the difference of each seed that both have, where they have several.
    """

    interval: significance.PairedInterval
    each: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """Runs that can be compared.

    Attributes:
      title: the data set, and where another section has it too, the difference.
      runs: in the order of the command.
      reference: the run against which the others are tested.
      tests: name of a run -> protocol -> its test.
      baselines: of UNTRAINED, likewise; their figures are those of the reference's results.
      settings: (flag, its value in each run), only those that differ.
      groupings: users by length and popularity; rows as `groups.group_metrics` returns them, by
        name of the run.
      notes: one line each.
    """

    title: str
    runs: Sequence[Run]
    reference: Run
    tests: Mapping[str, Mapping[str, Test]] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Test]] = dataclasses.field(default_factory=dict)
    settings: Sequence[tuple[str, Sequence[str]]] = ()
    groupings: Sequence[Grouping] = ()
    notes: Sequence[str] = ()

    @property
    def protocol(self) -> str:
        """The protocol by which best epochs were selected."""
        return self.reference.first.protocol

    @property
    def best(self) -> Run | None:
        """The best run by the mean validation NDCG@20; None where a run lacks it."""
        found = [run.spread('validation', self.protocol, SELECTION) for run in self.runs]
        if any(value is None for value in found):
            return None
        return max(zip(self.runs, found), key=lambda pair: pair[1]['mean'])[0]

    @property
    def untrained(self) -> list[str]:
        """The baselines that the reference's results have."""
        return [name for name in UNTRAINED if name in self.reference.first.results]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its sweep.json."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def best(self) -> Path:
        """The folder of the best setting."""
        return self.folder / self.record['best']


@dataclasses.dataclass(frozen=True)
class Row:
    """A model in a table of splits.

    Attributes:
      title: the model's name, and those of the runs where several rows have that model.
      runs: its run in each section; None where it has none.
      stage: the stage with its figures, or the name of a baseline in the results of those runs.
    """

    title: str
    runs: Sequence[Run | None]
    stage: str


@dataclasses.dataclass(frozen=True)
class Splits:
    """Models with the same settings in several splits of the same data.

    Attributes:
      sections: one of each split.
      rows: a model each, the baselines last.
    """

    sections: Sequence[Section]
    rows: Sequence[Row]

    @property
    def names(self) -> list[str]:
        """The split of each section."""
        return [split_name(section.reference.first.card) for section in self.sections]

    @property
    def targets(self) -> list[int]:
        """The number of test targets of each section."""
        return [count_targets(one.reference.first.card) for one in self.sections]


def split_name(card: Mapping[str, Any]) -> str:
    """The split of a protocol card in a few words."""
    by_time = card.get('time_split')
    return f'by time at {by_time["at"]}, {by_time["targets"]}' if by_time else 'leave one out'


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sections of runs, tables of splits, sweeps, and lines about folders that are left out."""

    sections: Sequence[Section]
    sweeps: Sequence[Sweep] = ()
    notes: Sequence[str] = ()
    splits: Sequence[Splits] = ()
