"""The runs of a comparison, read from their folders, and what two runs have in common."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fame_jax import run_dir
from fame_jax.config import FLAGS, binds
from fame_jax.config.fields import show
from fame_jax.errors import UserError
from fame_jax.evaluation.metrics import PROTOCOLS
from fame_jax.report import collect, figures_of_runs
from fame_jax.report.collect import RunReport
from fame_jax.report.comparison_record import Run, Sweep

OF_SEED = ('seed', 'backbone', 'append', 'from_run')  # flags that each seed has for itself


class Key(NamedTuple):
    """What is equal in all runs of a section.

    Fields:
      data: the fingerprint of the prepared data, which is the same in every split of them.
      select_on: the protocol by which best epochs were selected.
      Others: the parts of the protocol card with these names.
    """

    data: str
    split: str
    candidates: str
    masked: str
    unmasked: str
    ties: str
    select_on: str


def read_runs(folders: Sequence[Path], notes: list[str]) -> tuple[list[Run], list[Sweep]]:
    """The runs and sweeps; a line for each folder without results or with more than one run."""
    folders = [path.parent if path.name == 'results.json' else path for path in folders]
    sweeps: list[Sweep] = []
    found: list[tuple[Path, tuple[RunReport, ...]]] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f'{folder} is no folder of a run; check the path')
        _note_others(folder, notes)
        if (folder / run_dir.SWEEP).is_file():
            sweep = Sweep(folder, run_dir.read_json(folder / run_dir.SWEEP))
            try:
                figures_of_runs.read_settings(sweep.record)
            except UserError as error:
                raise UserError(f'{folder}: {error}') from error
            sweeps.append(sweep)
            folder = sweep.best
        reports = _read_run(folder, notes)
        if reports:
            found.append((folder, reports))
    resolved = [folder.resolve() for folder, _ in found]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f'{found[place][0]} is named twice; leave one out')
    names = [folder.resolve().name for folder, _ in found]
    return [
        Run(name if names.count(name) == 1 else str(folder), folder, reports)
        for name, (folder, reports) in zip(names, found)
    ], sweeps


def _note_others(folder: Path, notes: list[str]) -> None:
    """A line for a folder that holds more than one kind of runs, of which one is compared."""
    held = run_dir.contents(folder)
    if len(held) > 1:
        is_run, is_sweep = ((folder / n).is_file() for n in ('results.json', run_dir.SWEEP))
        shown = 'best setting' if is_sweep else 'single run' if is_run else 'run of all seeds'
        notes.append(
            f'{folder} holds {" and ".join(held.values())}: the {shown} alone is compared; keep '
            'each in a folder of its own'
        )


def _read_run(folder: Path, notes: list[str]) -> tuple[RunReport, ...]:
    """The record of a run, or of each of its seeds; () and a line where there are no results."""
    seeds = [] if (folder / 'results.json').is_file() else run_dir.seed_folders(folder)
    evaluated = [one for one in seeds or [folder] if (one / 'results.json').is_file()]
    for one in seeds or [folder]:
        if one not in evaluated:
            notes.append(f'{one} is left out: it has no results; run --stages=evaluate first')
    reports = tuple(map(collect.collect, evaluated))
    for one, report in zip(evaluated, reports):
        _check(one, report)
        same = (key_of(report), report.stage, report.names[report.stage])
        first = reports[0]
        if same != (key_of(first), first.stage, first.names[first.stage]):
            raise UserError(
                f'{folder}: {one.name} and {evaluated[0].name} are not the same model on the same '
                'data; compare them as runs of their own'
            )
        differ = _differences(report, first)
        if differ:
            notes.append(f'{one} has other settings than {evaluated[0].name}: {", ".join(differ)}')
    return reports


def _differences(report: RunReport, other: RunReport) -> list[str]:
    """Flags in which the runs of two seeds differ, but for those of a single seed, with values."""
    here, there = settings_of(report), settings_of(other)
    return [
        f'--{name}={here.get(name)} (there: {there.get(name)})'
        for name in dict.fromkeys([*here, *there])
        if name not in OF_SEED and here.get(name) != there.get(name)
    ]


def _check(folder: Path, report: RunReport) -> None:
    """Refuses results without figures of the compared model, and ranks of other targets."""
    try:
        for protocol in PROTOCOLS:
            report.metrics(report.stage, protocol)['ndcg@10']
        targets = collect.count_targets(report.card)
        data_of(report.card)
        PROTOCOLS.index(report.protocol)
        f'{targets:,} {report.card["dataset"]["users"]:,} {report.card["dataset"]["items"]:,}'
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{folder / "results.json"} is damaged; run --stages=evaluate again'
        ) from error
    for of_stage in report.ranks.values():
        for rank_R in of_stage.values():
            if len(rank_R) != targets:
                raise UserError(
                    f'{folder / "ranks.npz"} has ranks of {len(rank_R):,} targets and results.json '
                    f'has {targets:,}; run --stages=evaluate again'
                )


def key_of(report: RunReport) -> Key:
    """The key of the section that a run belongs to."""
    facts = [str(report.card.get(name, '')) for name in Key._fields[1:-1]]
    return Key(data_of(report.card), *facts, select_on=report.protocol)


def data_of(card: Mapping[str, Any]) -> str:
    """The fingerprint of the prepared data, which is the same in every split of them."""
    by_time = card.get('time_split')
    return by_time['data_sha256'] if by_time else card['dataset']['fingerprint']


def settings_of(report: RunReport) -> dict[str, str | None]:
    """The flags and pairs of flags that bind a run, as texts; None: it does not count."""
    values: dict[str, str | None] = {}
    for name, value in report.card.get('config', {}).items():
        bound = binds(name) if name in FLAGS else 'unknown'
        if bound in ('', 'data'):
            continue
        value = tuple(map(str, value)) if isinstance(value, list) else value
        separator = FLAGS[name].metadata.get('separator') if name in FLAGS else None
        if value is None or (bound == 'finetune' and report.stage != 'finetune'):
            values[name] = None
        elif separator:
            pairs = [str(pair).partition(separator) for pair in value or ()]
            values |= {f'{name}={key}': text for key, _, text in pairs}
        else:
            values[name] = show(value)
    return values


def find_data(runs: Iterable[Run]) -> Path | None:
    """The folder of the prepared data: of a run, next to its seeds, or the one of --prepared."""
    for run in runs:
        fingerprint = data_of(run.first.card)
        prepared = str(run.first.card.get('config', {}).get('prepared') or '')
        places = [run.folder, run.folder.resolve().parent, *([Path(prepared)] if prepared else [])]
        for place in places:
            path = place / 'dataset' / 'dataset.json'
            if path.is_file():
                card = run_dir.read_json(path)
                if isinstance(card, dict) and card.get('fingerprint') == fingerprint:
                    return path.parent
    return None
