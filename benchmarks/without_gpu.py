"""The real programs compiled for an H200 where none is, and what will bound them there.

    python -m benchmarks.without_gpu --json=FILE.json            a .md goes beside it
    python -m benchmarks.without_gpu --only=step,models --dataset=toys --data_dir=DATA

XLA's CUDA compiler needs no device, only a description of one (targets/h200.txtpb) and the plug-in:
pip install "jax[cuda13]". Nothing is run, so nothing here is measured: a kernel is a thunk of the
compiled program, the floor is the larger of operations over the data sheet's rate and of bytes over
its bandwidth, and a prediction adds to the floor LAUNCH for each kernel and READ for each number
that the host waits for. Both are assumptions. Without a device XLA cannot try which tiles or
library calls are fastest, so it makes all products itself (Triton), in tiles that a device would
not be given; some programs it cannot compile so, and can with
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false, which leaves products to cuBLAS.
"""

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import large_catalogue, machine, suite
from benchmarks.deviceless import BANDWIDTH, FLOPS, LAUNCH, READ, Compiler
from benchmarks.train_throughput import changed
from benchmarks.without_gpu_page import page
from fame_jax import records, sharding, stages
from fame_jax.errors import UserError
from fame_jax.models.build import MODELS
from fame_jax.recipes import RECIPES

Record = dict[str, Any]

MISSING = 'error: the CUDA compiler is not installed; pip install "jax[cuda13]", no GPU is needed'
ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}
DUMP = '--xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit__run|jit__rank_rows|jit_alone'

TOYS, TARGETS, SPORTS = 11_924, 109_361, 18_357  # items, and targets of an epoch


def steps(compiler: Compiler) -> dict[str, Callable[[], Record]]:
    """The training step of Toys' recipe in its variants."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(model: str, rows: int, chunk: int, **changes: Any) -> None:
        title = {'sasrec': 'SASRec', 'fame': 'FAME H 2 N 8'}[model]
        told = [title, f'{rows} rows', f'chunks of {chunk:,}' if chunk else 'plain']
        name = ', '.join([*told, *map(str, changes.values())])
        found[name] = model, {'rows_per_step': rows, 'chunk_tokens': chunk, **changes}

    for model in ('sasrec', 'fame'):
        add(model, 8, 128)
        add(model, 8, 0)
        add(model, 8, 128, dtype='bfloat16')
        add(model, 8, 128, random_bits='rbg')
        for chunk in (128, 512, 2048, 0):
            add(model, 512, chunk)
    add('sasrec', 8, 0, dtype='bfloat16')
    add('sasrec', 512, 0, dtype='bfloat16')
    for rows, chunks in ((32, (128, 512, 0)), (128, (128, 512, 2048, 0))):
        for chunk in chunks:
            add('sasrec', rows, chunk)
    kept = {'attention_dropout': 0.0}
    fused, half = kept | {'attention': 'fused'}, {'dtype': 'bfloat16'}
    found['FAME, weights kept'] = 'fame', kept
    found['FAME, weights kept, fused'] = 'fame', fused
    found['FAME, weights kept, bfloat16'] = 'fame', kept | half
    found['FAME, weights kept, fused, bfloat16'] = 'fame', fused | half
    found |= {f'FAME H 2 N {n}': ('fame', {'num_experts': n}) for n in (1, 2, 4, 16, 32)}
    found['FAME H 16 N 8'] = 'fame', {'num_heads': 16}
    return {
        name: functools.partial(_step, compiler, model, changes)
        for name, (model, changes) in found.items()
    }


def _step(
    compiler: Compiler, model: str, changes: dict[str, Any], mesh: tuple[int, int] | None = None
) -> Record:
    """A row of Toys' size, with the epoch that it makes."""
    run = changed(compiler.base, **changes)
    epoch = stages.epochs_of(run, 'finetune')(0)
    batches = list(epoch.batches)
    batch = max(batches, key=lambda batch: batch.tokens_BL.shape)
    mean = sum(float(batch.weights_BL.sum()) for batch in batches) / len(batches)
    mesh = compiler.mesh(*mesh) if mesh else None
    compiled = compiler.step(model, run, TOYS, batch, mesh)
    shared_by = mesh.shape[sharding.MODEL] if mesh else 1
    found = compiler.look(compiled, run.config.dtype, TOYS // shared_by)
    num = -(-TARGETS // mean)
    share = found['of_a_dispatch'] * LAUNCH / run.config.steps_per_dispatch
    return found | {
        'steps_per_epoch': num,
        'predicted_epoch_seconds': num * (found['predicted_seconds'] + share),
    }


def evaluation(compiler: Compiler) -> dict[str, Callable[[], Record]]:
    """1,024 users ranked at Toys', Sports' and a large catalogue's size."""
    return {
        f'1,024 users, {items:,} items': lambda items=items: compiler.look(
            compiler.ranks(items), 'float32', items
        )
        for items in (TOYS, SPORTS, 1_000_000)
    }


def large(compiler: Compiler) -> dict[str, Callable[[], Record]]:
    """Steps and losses at a million items and ten."""
    found = {}
    for tokens in (4096, 256):
        for chunks in ((512, 2048), (4096, 16_384), (4096, 65_536), (256, 65_536)):
            if chunks[0] <= max(512, tokens) and chunks[0] >= min(512, tokens):
                name = f'10M items, {tokens:,} tokens, {chunks[0]:,} x {chunks[1]:,}'
                told = {'chunk_tokens': chunks[0], 'chunk_items': chunks[1]}
                found[name] = functools.partial(_large, compiler, 10_000_000, tokens, told)
        told = {'loss': 'sampled', 'num_negatives': 8192}
        name = f'10M items, {tokens:,} tokens, sampled'
        found[name] = functools.partial(_large, compiler, 10_000_000, tokens, told)
    for chunks in ((512, 2048), (4096, 16_384)):
        told = {'chunk_tokens': chunks[0], 'chunk_items': chunks[1]}
        name = f'1M items, 4,096 tokens, {chunks[0]:,} x {chunks[1]:,}'
        found[name] = functools.partial(_large, compiler, 1_000_000, 4096, told)
        found[f'loss alone, {name}'] = functools.partial(_loss, compiler, chunks)
    return found


def _large(compiler: Compiler, items: int, tokens: int, changes: dict[str, Any]) -> Record:
    told = {'model': 'sasrec', **RECIPES['sasrec'], 'num_blocks': 1}
    told |= {'rows_per_step': tokens // 64, 'steps_per_dispatch': 1}
    run = changed(compiler.base, **told, **changes)
    batch = large_catalogue.make_batch(run.config.rows_per_step, items)
    table = 4 * (items + 1) * run.config.width
    found = compiler.look(compiler.step('sasrec', run, items, batch), 'float32', items)
    return found | {
        'table_bytes': table,
        'beside_gradient_bytes': found['temporaries_bytes'] - table,
    }


def _loss(compiler: Compiler, chunks: tuple[int, int]) -> Record:
    compiled = compiler.loss(1_000_000, 4096, chunks)
    found = compiler.look(compiled, 'float32', 1_000_000)
    share = found['temporaries_bytes'] / (4 * 4096 * 1_000_000)
    return found | {'beside_gradient_bytes': found['temporaries_bytes'], 'of_logits': share}


def meshes(compiler: Compiler) -> dict[str, Callable[[], Record]]:
    """SASRec's step on several devices, each with as many rows as one alone has."""
    found, devices = {}, len(compiler.several)
    for data, model in ((devices, 1), (devices // 2, 2), (1, devices)):
        # The batch is laid out as for one device; what is compiled divides it.
        found[f'SASRec {data}x{model} devices, {8 * data} rows'] = functools.partial(
            _step, compiler, 'sasrec', {'rows_per_step': 8 * data}, (data, model)
        )
    return found if devices > 1 else {}


def models(compiler: Compiler) -> dict[str, Callable[[], Record]]:
    """Every model by its recipe."""
    return {
        f'{MODELS[model].title} by its recipe': functools.partial(
            _step, compiler, model, {'model': model, **RECIPES.get(model, {})}
        )
        for model in MODELS
    }


SECTIONS = {
    'step': steps,
    'evaluation': evaluation,
    'large': large,
    'meshes': meshes,
    'models': models,
}


def compile_all(arguments: argparse.Namespace, target: str, write: Callable[[Record], None]):
    """Every row of the sections asked for; told as they come, a failure as a row."""
    with tempfile.TemporaryDirectory() as folder:
        base = suite.open_base(argparse.Namespace(**vars(arguments), quick=False), folder)
        compiler = Compiler(base, target, arguments.devices, arguments.dump)
        about = {'machine': machine.about(), 'target': target, 'sections': {}}
        about['assumed'] = {'launch_seconds': LAUNCH, 'read_seconds': READ}
        about['data_sheet'] = {'flops': FLOPS, 'bandwidth': BANDWIDTH}
        for section in arguments.only.split(','):
            rows = about['sections'].setdefault(section, [])
            for name, make in SECTIONS[section](compiler).items():
                began, row = time.monotonic(), {'name': name}
                try:
                    row |= make()
                except Exception as error:  # not supported, not compiled: a finding too
                    row['failed'] = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
                row['compile_seconds'] = time.monotonic() - began
                rows.append(row)
                told = row.get('failed', f'{row.get("kernels", 0):,.0f} kernels')
                print(
                    f'{name}: {told}, {row["compile_seconds"]:.0f} s', file=sys.stderr, flush=True
                )
                write(about)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints and writes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='synthetic', help='of which the batches are')
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--devices', type=int, default=8, help='of the meshes')
    parser.add_argument('--target', type=Path, default=Path(__file__).parent / 'targets/h200.txtpb')
    parser.add_argument('--only', default=','.join(SECTIONS))
    parser.add_argument('--json', type=Path, help='FILE.json; a .md goes beside it')
    parser.add_argument('--dump', type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only.split(',')) - set(SECTIONS):
        parser.error(f'--only={",".join(unknown)}: there are {", ".join(SECTIONS)}')
    if not importlib.util.find_spec('jax_cuda13_plugin'):
        print(MISSING, file=sys.stderr)
        return 2
    if not arguments.dump:  # again, with what has to be set before jax is there
        with tempfile.TemporaryDirectory() as folder:
            flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_dump_to={folder} {DUMP}'
            command = [sys.executable, '-m', 'benchmarks.without_gpu', *argv, f'--dump={folder}']
            environment = os.environ | ENVIRONMENT | {'XLA_FLAGS': flags}
            return subprocess.run(command, env=environment).returncode
    result: Record = {}

    def write(found: Record) -> None:
        result.update(found)
        if arguments.json:
            records.write_json(arguments.json, found)
            records.write_text(arguments.json.with_suffix('.md'), page(found) + '\n')

    try:
        compile_all(arguments, arguments.target.read_text(), write)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(page(result))
    return 0


if __name__ == '__main__':
    sys.exit(main())
