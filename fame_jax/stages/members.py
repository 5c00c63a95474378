"""Several seeds of one run: --seeds.

WORKDIR holds the prepared data and seeds.json, the results over the seeds; WORKDIR/seed_0 and so on
hold a run each, as a command with --seed=0 makes it, which every other command can use.

    auto    vmap on an accelerator, loop on a CPU
    vmap    all seeds in one program, each operation for all of them, which rounds otherwise
    loop    one after the other, to the bit as by themselves; data, evaluation batches and programs
            are shared
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import machine, run_dir
from fame_jax.config import flags as config_flags
from fame_jax.errors import UserError
from fame_jax.evaluation import metrics, significance
from fame_jax.screen import Screen, grid, short
from fame_jax.stages import settings
from fame_jax.stages.context import TRAINED, RunContext, abstract_params, open_run
from fame_jax.stages.prepare import prepare
from fame_jax.stages.train import describe_end, make_setup, open_checkpoints, open_stage
from fame_jax.training.loop import Loop
from fame_jax.training.members import (
    Member,
    fit_members,
    make_member_step,
    stack_members,
    stack_trees,
)
from fame_jax.training.profile import Profile
from fame_jax.training.step import Program, abstract_state

Run = Callable[[RunContext], None]

SHOWN = ('hr@10', 'ndcg@10', 'ndcg@20')  # the metrics on the screen


def run_seeds(given: config_flags.Given, stages: Mapping[str, Run], screen: Screen) -> None:
    """Runs the stages of a command with --seeds.

    Args:
      given: the flags of the command.
      stages: the functions of the stages of one run.
      screen: the terminal.

    Raises:
      UserError: for settings that do not fit together or to what the folders hold.
    """
    seeds, folder = parse_seeds(given), Path(given.workdir)
    of_all = ('seeds', 'members')
    values = {name: value for name, value in given.values.items() if name not in of_all}
    prepared = values.get('prepared', str(folder))

    def of_seed(seed: int, **more: Any) -> config_flags.Given:
        own = {'workdir': str(folder / f'seed_{seed}'), 'seed': seed, **more}
        if 'backbone' in values:
            own['backbone'] = _backbone_of(values['backbone'], seed)
        return dataclasses.replace(given, values={**values, **own})

    wanted = settings.complete(of_seed(seeds[0]))[0].run.stages
    if 'prepare' in wanted:
        prepare_for_all(dataclasses.replace(given, values=values), screen)
    wanted = tuple(stage for stage in wanted if stage != 'prepare')
    with contextlib.ExitStack() as stack:
        contexts = [
            open_run(of_seed(seed, stages=wanted, prepared=prepared), screen=screen)
            for seed in (seeds if wanted else ())
        ]
        for context in contexts:
            stack.enter_context(contextlib.closing(context))
        run_stages(contexts, wanted, stages, given.get('members'))
        if 'evaluate' in wanted:
            print(write_results(folder, contexts))


def prepare_for_all(given: config_flags.Given, screen: Screen) -> None:
    """Prepares the data in WORKDIR for the runs in its folders, unless --prepared names others."""
    if 'prepared' in given.values:
        return
    of_data = {**given.values, 'workdir': given.workdir, 'stages': ('prepare',)}
    with contextlib.closing(open_run(config_flags.Given(of_data), screen=screen)) as context:
        prepare(context)


def _backbone_of(backbone: str, seed: int) -> str:
    """The value of --backbone for one seed: of a run with --seeds, the folder of the same seed.

    Raises:
      UserError: when that run has other seeds only.
    """
    if backbone in ('pretrain', 'scratch') or not run_dir.seed_folders(Path(backbone)):
        return backbone
    own = Path(backbone) / f'seed_{seed}'
    if not own.is_dir():
        raise UserError(f'--backbone={backbone} holds no run of seed {seed}; choose from its seeds')
    return str(own)


def parse_seeds(given: config_flags.Given) -> list[int]:
    """The numbers of --seeds.

    Raises:
      UserError: for a value that is no seed or is given twice, or with --seed, --distributed or
        --out.
    """
    texts = given.get('seeds')
    for text in texts:
        if not (text.isdecimal() and int(text) < 2**32):
            raise UserError(
                f'--seeds={",".join(texts)}: {text!r} is no seed; give whole numbers from 0, such '
                'as 0,1,2'
            )
    seeds = [int(text) for text in texts]
    if len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds={",".join(texts)} has a seed twice; give each once')
    for name in ('seed', 'distributed', 'out'):  # the seeds would write the same file
        if name in given.values:
            raise UserError(f'--{name} does not go with --seeds; leave one of them out')
    return seeds


def run_stages(
    contexts: Sequence[RunContext],
    wanted: Sequence[str],
    stages: Mapping[str, Run],
    how: str = 'auto',
) -> None:
    """Runs each stage for all seeds before the next stage.

    Args:
      contexts: a run for each seed; the others take data and programs from the first.
      wanted: names of stages.
      stages: the functions of the stages of one run.
      how: as --members.

    Raises:
      UserError: where --members asks for one program and the model or settings cannot.
    """
    for context in contexts[1:]:
        context.share(contexts[0])
    for stage in wanted:
        together = stage in TRAINED and choose_how(contexts[0], stage, how) == 'vmap'
        if together and len(contexts) > 1:
            at_once = count_members(contexts[0], stage, len(contexts))
            for first in range(0, len(contexts), at_once):
                train_members(contexts[first : first + at_once], stage)
            continue
        for context in contexts:
            with _one_of(contexts, context, stage), context.screen.waiting(stage):
                stages[stage](context)


@contextlib.contextmanager
def _one_of(contexts: Sequence[RunContext], context: RunContext, stage: str) -> Iterator[None]:
    """Names the seed before it trains, and leaves out its own table, where it is not alone."""
    prints = context.prints
    if len(contexts) > 1 and stage in TRAINED:
        context.screen.say(f'{stage}: seed {context.config.run.seed}')
    if len(contexts) > 1 and stage == 'evaluate':
        context.prints = False
    try:
        yield
    finally:
        context.prints = prints


def choose_how(context: RunContext, stage: str, how: str) -> str:
    """How several seeds train, 'vmap' or 'loop', for a value of --members.

    Raises:
      UserError: where --members asks for one program and the model or settings cannot.
    """
    config = context.config
    reasons = {
        'rows of several shapes': context.module(stage).row_layout == 'prefixes',
        'a mesh of devices': context.mesh is not None,
        'a schedule, which counts the steps of each seed': config.training.has_schedule,
        'a profile': bool(config.devices.profile),
        '--track=trackio, which has one run at a time': 'trackio' in config.run.track,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), '')
    if how == 'auto':
        return 'loop' if reason or jax.default_backend() == 'cpu' else 'vmap'
    if how == 'vmap' and reason:
        raise UserError(
            f'--members=vmap: seeds cannot share one program with {reason}; use --members=loop'
        )
    return how


def count_members(context: RunContext, stage: str, number: int) -> int:
    """How many of so many runs the device's memory lets train at once, by an estimate.

    A member takes its state twice, since the stack is taken apart at the end of an epoch, its
    gradients and best parameters, and a few copies of a block of logits.
    """
    limit = machine.device_memory()
    if limit is None:
        return number
    setup, loss = make_setup(context, stage), context.config.loss
    state = abstract_state(abstract_params(setup.module), setup.optimizer, None)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    num_tokens, num_items = setup.batch.tokens_BL.size, context.data.num_items
    rows = min(loss.chunk_tokens if loss.chunk_tokens > 0 else num_tokens, num_tokens)
    columns = min(loss.chunk_items or num_items, num_items)
    logits_bytes = rows * columns * np.dtype(np.float32).itemsize
    fitting = int(0.8 * limit) // (3 * state_bytes + 4 * logits_bytes)
    return max(1, min(number, fitting))


def train_members(contexts: Sequence[RunContext], stage: str) -> None:
    """Trains a stage of several seeds in one program, each from its checkpoint if there is one."""
    screen, quiet = contexts[0].screen, Screen('none')
    with contextlib.ExitStack() as stack:
        members, silent = [], screen
        for context in contexts:
            checkpoints = stack.enter_context(open_checkpoints(context, stage, screen))
            if checkpoints is None:
                continue
            if not members:
                _precompile(contexts, stage)
            opened = stack.enter_context(open_stage(context, stage, checkpoints, silent))
            silent = quiet  # the model is named once
            setup, nothing = opened.setup, stack.enter_context(contextlib.closing(Profile('')))
            program = _member_program(contexts, stage)
            loop = Loop(program, profile=nothing, **opened.parts)
            loop.log.screen = quiet
            with screen.waiting(f'{stage}: validating seed {context.config.run.seed}'):
                loop.start(**opened.start)
            opened.start.clear()  # the loop has the state
            name = f'seed {context.config.run.seed}'
            members.append(Member(name, loop, setup.epochs, opened.before_epoch))
        if not members:
            return
        screen.say(f'{stage}: {len(members)} seeds in one program')
        fit_members(members, len(contexts), program, screen)
    for member in members:
        screen.say(f'{stage}: {member.name}, {describe_end(member.loop.progress)}')


def _member_program(contexts: Sequence[RunContext], stage: str) -> Program:
    """The blocks of steps of all members, whose steps are alike; the same object each time."""
    programs, name = contexts[0].programs, f'{stage} of {len(contexts)} members'
    if name not in programs:
        setup = make_setup(contexts[0], stage)
        programs[name] = Program(make_member_step(setup.step), setup.program.size)
    return programs[name]


def _precompile(contexts: Sequence[RunContext], stage: str) -> None:
    """Traces the programs of this stage and of later ones; a thread compiles them meanwhile."""
    first, places = contexts[0], len(contexts)
    stages = [s for s in first.config.run.stages if s in TRAINED]
    for later in stages[stages.index(stage) :]:
        setup = make_setup(first, later)
        state = abstract_state(abstract_params(setup.module), setup.optimizer, None)
        stacked = jax.eval_shape(stack_trees, [state] * places)
        (batch,) = stack_members([[setup.batch]] * places)
        key = jnp.stack([jax.random.fold_in(setup.key, 1)] * places)
        _member_program(contexts, later).precompile(stacked, batch, key, first.executor)
        if later != stage:  # the first stage validates before it trains, in the main thread
            first.ranker(later).precompile('selection', first.executor)


def write_results(folder: Path, contexts: Sequence[RunContext]) -> str:
    """Writes WORKDIR/seeds.json, the results over the seeds, and returns them as a table.

    The file has the protocol card, without the parts of a single seed; the mean and the standard
    deviation of each model; and the paired test of FAME against its backbone.
    """
    records = [run_dir.read_json(context.folder / 'results.json') for context in contexts]
    seeds = [context.config.run.seed for context in contexts]
    card = {k: v for k, v in records[0]['card'].items() if k not in ('seed', 'stages')}
    card['config'] = {k: v for k, v in card['config'].items() if k not in ('seed', 'workdir')}
    names = [name for name in records[0]['results'] if all(name in r['results'] for r in records)]
    results = {
        name: {
            'model': records[0]['results'][name]['model'],
            **{
                statistic: _over([record['results'][name] for record in records], function)
                for statistic, function in (
                    ('mean', statistics.fmean),
                    ('deviation', statistics.stdev),
                )
                if statistic == 'mean' or len(seeds) > 1
            },
        }
        for name in names
    }
    for name in dict.fromkeys(name for r in records for name in r['results']):
        if name not in names:
            contexts[0].screen.say(f'evaluate: {name} is left out, since not all seeds have it')
    tests = _tests(contexts) if set(TRAINED) <= set(names) else {}
    run_dir.write_json(
        folder / run_dir.SEEDS,
        {'seeds': seeds, 'card': card, 'over_seeds': results, 'tests': tests},
    )
    return _table(card, results, tests, folder, len(seeds))


def _over(rows: Sequence[Mapping[str, Any]], function: Callable[..., float]) -> dict[str, Any]:
    """A statistic of each metric of validation and test."""
    return {
        split: {
            protocol: {
                name: function([row[split][protocol][name] for row in rows])
                for name in rows[0][split][protocol]
            }
            for protocol in metrics.PROTOCOLS
        }
        for split in ('validation', 'test')
    }


def _tests(contexts: Sequence[RunContext]) -> dict[str, Any]:
    """FAME's NDCG@10 minus its backbone's: the mean over seeds and users, and each seed's own."""
    ranks = []
    for context in contexts:
        with np.load(context.folder / 'ranks.npz') as file:
            ranks.append({name: file[name] for name in file.files})
    tests = {}
    for split in ('validation', 'test'):
        for protocol in metrics.PROTOCOLS:
            first, second = (
                [significance.ndcg(of[f'{stage}/{split}/{protocol}'], 10) for of in ranks]
                for stage in ('finetune', 'pretrain')
            )
            test = significance.paired_interval(np.mean(first, axis=0), np.mean(second, axis=0))
            each = [float((a - b).mean()) for a, b in zip(first, second)]
            tests.setdefault(split, {})[protocol] = test._asdict() | {'of_each_seed': each}
    return tests


def _table(
    card: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    tests: Mapping[str, Any],
    folder: Path,
    number: int,
) -> str:
    """The test metrics of both protocols as mean ± standard deviation, and the paired tests."""
    data = card['dataset']
    lines = [
        f'\n{data["name"]}, test: all {data["users"]:,} users, each against all '
        f'{data["items"]:,} items; mean ± standard deviation of {number} seeds'
    ]
    for protocol in metrics.PROTOCOLS:
        rows = [[row['model'], *_cells(row, protocol)] for row in results.values()]
        head = [protocol, *(column.upper() for column in SHOWN)]
        lines.append('\n' + grid(head, rows, right=range(1, len(head))))
    if tests:
        rows = [
            [
                f'{split}, {protocol}',
                short(test['difference'], '+'),
                f'{short(test["low"], "+")} to {short(test["high"], "+")}',
                f'{sum(value > 0 for value in test["of_each_seed"])} of {number}',
            ]
            for split, of_split in tests.items()
            for protocol, test in of_split.items()
        ]
        head = ['finetune minus pretrain, NDCG@10', 'mean', '95 % over users', 'seeds above 0']
        lines.append('\n' + grid(head, rows, right=(1, 2, 3)))
    lines.append(f'\nThe runs are in {folder}/seed_*; {folder / run_dir.SEEDS} has all figures.')
    return '\n'.join(lines)


def _cells(row: Mapping[str, Any], protocol: str) -> list[str]:
    """The shown metrics of a row; without a deviation where there is none."""
    mean = row['mean']['test'][protocol]
    deviation = row.get('deviation', row['mean'])['test'][protocol]
    if 'deviation' not in row or not any(deviation.values()):
        return [short(mean[name]) for name in SHOWN]
    return [f'{short(mean[name])} ± {short(deviation[name])}' for name in SHOWN]
