"""Everything that is fast or slow, measured in one run on one machine: a table, and JSON beside it.

    python -m benchmarks.suite --dataset=toys --data_dir=DATA --out=FOLDER_OR_FILE.json
    python -m benchmarks.suite --quick                    synthetic data, fewer variants
    python -m benchmarks.suite --only=step,loss           some sections

Variants take turns, so that a machine that slows down slows all of them; times are medians with
P10 and P90 after compilation. Shares are of what the same device does in the same run with a large
product of matrices and a large copy. A variant that fails is told in its row. Runs unchanged on CPU
and CUDA.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import attention_alone, loss_alone, machine, roofline, suite_page, whole_job
from benchmarks import train_throughput as training
from benchmarks.turns import Effort
from fame_jax import config as config_lib
from fame_jax import records, stages
from fame_jax import run as run_lib
from fame_jax.data import sequences
from fame_jax.errors import UserError
from fame_jax.screen import duration

FULL, QUICK = Effort(rounds=8, seconds=0.25), Effort(rounds=3, seconds=0.15, quick=True)


class Section(NamedTuple):
    """One part of the suite."""

    measure: Callable[..., list[dict[str, Any]]]  # (run, effort, deadline) -> records
    unit: str  # of what a record does so many of a second
    share: float  # of the time that all have


SECTIONS = {
    'step': Section(training.time_steps, 'targets', 0.55),
    'epoch': Section(training.time_epochs, 'histories', 0.08),
    'input': Section(training.time_input, 'batches', 0.02),
    'evaluation': Section(whole_job.time_evaluation, 'users', 0.05),
    'loss': Section(loss_alone.time_loss, 'tokens', 0.08),
    'attention': Section(attention_alone.time_attention, 'positions', 0.15),
    'job': Section(whole_job.time_job, '', 0.07),
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='synthetic')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--out', type=Path, help='FILE.json, or a folder; a .md goes beside it')
    parser.add_argument('--only', default='', help=f'sections of {",".join(SECTIONS)}')
    parser.add_argument('--quick', action='store_true', help='fewer variants and shorter turns')
    parser.add_argument(
        '--minutes', type=float, default=8, help='what would begin later is left out; 0: nothing'
    )
    parser.add_argument(
        '--precision',
        choices=('tensorfloat32', 'highest', 'bfloat16'),
        help='of all float32 products (jax_default_matmul_precision); default: as jax has it',
    )
    arguments = parser.parse_args(argv)
    arguments.only = chosen(parser, arguments.only, SECTIONS)
    return arguments


def chosen(parser: argparse.ArgumentParser, only: str, names: Iterable[str]) -> list[str]:
    """What --only names of these, in its order; empty: all. Another name ends the program."""
    names = list(names)
    several = only.split(',') if only else names
    unknown = [name for name in several if name not in names]
    if unknown:
        parser.error(f'--only={",".join(unknown)}: there are {", ".join(names)}')
    return several


def open_base(arguments: argparse.Namespace, folder: str) -> run_lib.Run:
    """The data, prepared once for all, as a run of the defaults."""
    config = config_lib.Config(
        dataset=arguments.dataset,
        data_dir=arguments.data_dir,
        workdir=f'{folder}/base',
        progress='none',
        synthetic_users=5000 if arguments.quick else 20_000,
        synthetic_items=12_000,
    )
    base = run_lib.open_run(config)
    stages.prepare(base)
    return base


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Every section asked for, in order; a line on stderr as each begins."""
    began, effort = time.monotonic(), QUICK if arguments.quick else FULL
    result = {'machine': machine.about(), 'arguments': _plain(arguments)}
    _say(f'data and device: {arguments.dataset}, {jax.devices()[0].device_kind}')
    base = open_base(arguments, folder)
    rates = roofline.rates()
    result |= {'dataset': sequences.describe(base.data), 'rates': rates, 'sections': {}}
    result['sections']['device'] = {'unit': '', 'records': device_records(rates)}
    minutes = arguments.minutes or float('inf')
    total, so_far = sum(SECTIONS[name].share for name in arguments.only), 0.0
    for number, name in enumerate(arguments.only, 1):
        section = SECTIONS[name]
        so_far += section.share / total
        at = time.monotonic()
        _say(f'{number}/{len(arguments.only)} {name}, {duration(at - began)} gone')
        found = section.measure(base, effort, began + 60 * minutes * so_far)
        result['sections'][name] = {
            'unit': section.unit,
            'seconds': time.monotonic() - at,
            'peak_bytes': machine.peaks(),
            'records': [record | suite_page.share(record, rates) for record in found],
        }
    result['sections']['memory'] = {'unit': '', 'records': memory_records()}
    return result | {'seconds': time.monotonic() - began}


def device_records(rates: dict[str, float]) -> list[dict[str, Any]]:
    """The device's own rates as rows."""
    products = [
        {'name': f'product, {name}', 'flops_per_second': rate}
        for name, rate in rates.items()
        if name != 'copy'
    ]
    return [*products, {'name': 'copy', 'bytes_per_second': rates['copy']}]


def memory_records() -> list[dict[str, Any]]:
    """The peaks of the whole suite as rows."""
    return [
        {'name': f'{name}, most held', 'temporaries_bytes': peak}
        for name, peak in machine.peaks().items()
    ]


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}


def _say(line: str) -> None:
    print(f'suite: {line}', file=sys.stderr, flush=True)


def place(out: Path, kind: str) -> Path:
    """The file that is meant: --out itself, or one in it that is named after the device."""
    if out.suffix == '.json':
        return out
    return out / f'suite_{"_".join(kind.lower().split())}.json'


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.precision:
        jax.config.update('jax_default_matmul_precision', arguments.precision)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(arguments, folder)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    page = f'{suite_page.about(result)}\n\n{suite_page.table(result["sections"], result["rates"])}'
    print(page)
    if arguments.out:
        path = place(arguments.out, jax.devices()[0].device_kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(path, result)
        records.write_text(path.with_suffix('.md'), page + '\n')
        _say(f'written to {path}, and {path.with_suffix(".md").name} beside it')
    return 0


if __name__ == '__main__':
    sys.exit(main())
