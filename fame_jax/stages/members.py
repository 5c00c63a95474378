"""Several seeds of one run: --seeds.

WORKDIR holds the prepared data and seeds.json, the results over the seeds; WORKDIR/seed_0 and so on
hold a run each, as a command with --seed=0 makes it, which every other command can use. Seeds may
be added by later commands; the results are those of all that are finished.

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
from jax.flatten_util import ravel_pytree

from fame_jax import machine, run_dir
from fame_jax.config import FLAGS, SECTIONS, binds, differences
from fame_jax.config import flags as config_flags
from fame_jax.errors import UserError
from fame_jax.evaluation import metrics, significance
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.screen import Screen, grid, short
from fame_jax.stages import settings
from fame_jax.stages.context import TRAINED, RunContext, abstract_params, open_run
from fame_jax.stages.evaluate import title
from fame_jax.stages.prepare import prepare
from fame_jax.stages.train import (
    describe_end,
    make_setup,
    open_checkpoints,
    open_stage,
    step_of_numbers,
    train,
)
from fame_jax.stages.train import numbers as numbers_of
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
    of_one = dataclasses.replace(given, values=values)
    wanted = settings.complete(of_seed(of_one, seeds[0]))[0].run.stages
    for seed in other_seeds(folder, seeds):  # whose results are part of seeds.json
        settings.complete(of_seed(of_one, seed))
    if 'prepare' in wanted:
        prepare_for_all(of_one, screen)
    wanted = tuple(stage for stage in wanted if stage != 'prepare')
    with contextlib.ExitStack() as stack:
        contexts = [
            open_run(of_seed(of_one, seed, stages=wanted, prepared=prepared), screen=screen)
            for seed in (seeds if wanted else ())
        ]
        for context in contexts:
            stack.enter_context(contextlib.closing(context))
        run_stages(contexts, wanted, stages, given.get('members'))
        if 'evaluate' in wanted:
            print(write_results(folder, contexts))


def of_seed(given: config_flags.Given, seed: int, **more: Any) -> config_flags.Given:
    """The flags of a command for the run of one seed, in a folder of its own."""
    own = {'workdir': str(Path(given.workdir) / f'seed_{seed}'), 'seed': seed, **more}
    if 'backbone' in given.values:
        own['backbone'] = _backbone_of(given.values['backbone'], seed)
    return dataclasses.replace(given, values={**given.values, **own})


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


def other_seeds(folder: Path, seeds: Sequence[int]) -> list[int]:
    """The seeds that a folder has runs of, without those of a command."""
    found = [int(path.name.removeprefix('seed_')) for path in run_dir.seed_folders(folder)]
    return [seed for seed in found if seed not in seeds]


def name_of_seed(context: RunContext) -> str:
    """The name of a run among those of several seeds."""
    return f'seed {context.config.run.seed}'


def run_stages(
    contexts: Sequence[RunContext],
    wanted: Sequence[str],
    stages: Mapping[str, Run],
    how: str = 'auto',
    name: Callable[[RunContext], str] = name_of_seed,
    until: int | None = None,
) -> None:
    """Runs each stage for all runs before the next stage.

    Args:
      contexts: runs that differ in their seeds and in `train.numbers`; the others take data from
        the first, and programs where they differ in seeds alone.
      wanted: names of stages.
      stages: the functions of the stages of one run.
      how: as --members.
      name: names a run on the screen.
      until: training stops after this epoch of a stage; None: at its limits.

    Raises:
      UserError: where --members asks for one program and the model or settings cannot.
    """
    first = contexts[0]
    in_one = {s: s in TRAINED and choose_how(first, s, how) == 'vmap' for s in wanted}
    for context in contexts[1:]:
        is_same = all(numbers_of(context, s) == numbers_of(first, s) for s in TRAINED)
        context.share(first, programs=is_same, rankers=is_same or any(in_one.values()))
    for stage, together in in_one.items():
        if together and len(contexts) > 1:
            at_once = count_members(first, stage, len(contexts))
            for begin in range(0, len(contexts), at_once):
                train_members(contexts[begin : begin + at_once], stage, name, until)
            continue
        for context in contexts:
            with _one_of(contexts, context, stage, name), context.screen.waiting(stage):
                if stage in TRAINED:
                    train(context, stage, until)
                else:
                    stages[stage](context)


@contextlib.contextmanager
def _one_of(
    contexts: Sequence[RunContext],
    context: RunContext,
    stage: str,
    name: Callable[[RunContext], str],
) -> Iterator[None]:
    """Names the run before it trains, and leaves out its own table, where it is not alone."""
    prints = context.prints
    if len(contexts) > 1 and stage in TRAINED:
        context.screen.say(f'{stage}: {name(context)}')
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


def train_members(
    contexts: Sequence[RunContext],
    stage: str,
    name: Callable[[RunContext], str] = name_of_seed,
    until: int | None = None,
) -> None:
    """Trains a stage of several runs in one program, each from its checkpoint if there is one.

    Args:
      contexts: runs that differ in their seeds and in the settings of `train.numbers`, in values
        alone.
      stage: 'pretrain' or 'finetune'.
      name: names a run on the screen.
      until: stops after this epoch; None: at the limits.
    """
    screen, quiet, group = contexts[0].screen, Screen('none'), Group(contexts, stage)
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
            nothing = stack.enter_context(contextlib.closing(Profile('')))
            loop = Loop(group.program, profile=nothing, **opened.parts)
            loop.log.screen = quiet
            with screen.waiting(f'{stage}: validating {name(context)}'):
                loop.start(**opened.start)
            opened.start.clear()  # the loop has the state
            about = opened.setup.epochs, opened.before_epoch, group.numbers_of(context)
            members.append(Member(name(context), loop, *about))
        if not members:
            return
        screen.say(f'{stage}: {len(members)} runs in one program{group.describe_devices()}')
        fit_members(members, group.places, group.program, screen, group.mesh, until)
    for member in members:
        screen.say(f'{stage}: {member.name}, {describe_end(member.loop.progress)}')


class Group:
    """What runs that train a stage together share.

    Attributes:
      mesh: the devices that share the runs; None: one device.
      places: the runs, rounded up to a multiple of the devices.
      program: blocks of steps of all runs; the same object for the same runs.
    """

    def __init__(self, contexts: Sequence[RunContext], stage: str):
        """Compiles nothing yet."""
        first, self._stage = contexts[0], stage
        self.mesh = mesh_lib.make_member_mesh(len(contexts))
        devices = self.mesh.size if self.mesh else 1
        self.places = -(-len(contexts) // devices) * devices
        each = [numbers_of(context, stage) for context in contexts]
        # The others stay constants of the program, with the bits that they have in a single run.
        self._names = [name for name in each[0] if any(o[name] != each[0][name] for o in each)]
        name = f'{stage} of {self.places} members, who differ in {", ".join(self._names)}'
        if name not in first.programs:
            setup = make_setup(first, stage)
            step, unravel = setup.step, None
            if self._names:
                step, unravel = step_of_numbers(first, stage), self._ravel(first)[1]
            member_step = make_member_step(step, unravel, self.mesh)
            first.programs[name] = Program(
                member_step, setup.program.size, packs=setup.program.packs
            )
        self.program = first.programs[name]

    def numbers_of(self, context: RunContext) -> np.ndarray:
        """The settings of a run in which the runs differ, float32 [N]."""
        return np.asarray(self._ravel(context)[0], np.float32)

    def _ravel(self, context: RunContext) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
        found = numbers_of(context, self._stage)
        return ravel_pytree({name: jax.tree.map(jnp.float32, found[name]) for name in self._names})

    def describe_devices(self) -> str:
        """The devices in words; '' for one."""
        return f', on {self.mesh.size} devices' if self.mesh else ''


def _precompile(contexts: Sequence[RunContext], stage: str) -> None:
    """Traces the programs of this stage and of later ones; threads compile them meanwhile."""
    first = contexts[0]
    stages = [s for s in first.config.run.stages if s in TRAINED]
    for later in stages[stages.index(stage) :]:
        setup, group = make_setup(first, later), Group(contexts, later)
        places = group.places
        state = abstract_state(abstract_params(setup.module), setup.optimizer, None)
        stacked = jax.eval_shape(stack_trees, [state] * places)
        numbers = [group.numbers_of(first)] * places
        (batch,) = stack_members([[setup.batch]] * places, numbers)
        key = jnp.stack([jax.random.fold_in(setup.key, 1)] * places)
        stacked, key = mesh_lib.share_members((stacked, key), group.mesh)
        group.program.precompile(stacked, batch, key, first.executor)
        if later != stage:  # the first stage validates before it trains, in the main thread
            first.ranker(later).precompile('selection', first.executor)


def write_results(folder: Path, contexts: Sequence[RunContext]) -> str:
    """Writes WORKDIR/seeds.json, the results over the seeds, and returns them as a table.

    The file has the protocol card, without the parts of a single seed; the mean and the standard
    deviation of each model; and the paired test of FAME against its backbone. Finished runs of
    other seeds in the folder count too; the table ends with the seeds that do not.

    Args:
      folder: of the seeds.
      contexts: the runs of a command, evaluated.
    """
    own = {context.config.run.seed: context.folder for context in contexts}
    others = {seed: folder / f'seed_{seed}' for seed in other_seeds(folder, list(own))}
    left_out = {seed: _why_left_out(contexts[0], path) for seed, path in others.items()}
    notes = [f'Seed {seed} is left out: {why}.' for seed, why in left_out.items() if why]
    counted = [seed for seed in others if not left_out[seed]]
    if counted:
        notes.insert(0, f'Runs of earlier commands count too: seed {", ".join(map(str, counted))}.')
    runs = own | {seed: others[seed] for seed in counted}
    seeds = sorted(runs)
    records = [run_dir.read_json(runs[seed] / 'results.json') for seed in seeds]
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
    tests = _tests([runs[seed] for seed in seeds]) if set(TRAINED) <= set(names) else {}
    run_dir.write_json(
        folder / run_dir.SEEDS,
        {'seeds': seeds, 'card': card, 'over_seeds': results, 'tests': tests},
    )
    table = _table(title(contexts[0].data), results, tests, folder, len(seeds))
    return '\n'.join([table, *notes])


def _why_left_out(first: RunContext, folder: Path) -> str:
    """Why the run of another seed has no part in the results; '' where it has.

    Args:
      first: an evaluated run of the command.
      folder: of the other run.
    """
    if not all((folder / name).is_file() for name in ('results.json', 'ranks.npz')):
        return 'it has no results; add it to --seeds'
    (card, results), (other_card, others) = map(run_dir.read_results, (first.folder, folder))
    trained, theirs = ([s for s in TRAINED if s in found] for found in (results, others))
    if trained != theirs:
        return f'its results are those of {", ".join(theirs)} alone; add it to --seeds'
    sections = {*SECTIONS, *(['finetune'] if 'finetune' in trained else [])}
    values = {n: v for n, v in other_card.get('config', {}).items() if n in FLAGS}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if binds(n)}
    differ = [
        one
        for one in differences(first.config, first.config.replace(**values), sections)
        if not one.startswith(('--seed=', '--backbone='))
    ]
    if differ:
        return f'{", ".join(differ)}; add it to --seeds'
    same = card['dataset']['fingerprint'] == other_card['dataset']['fingerprint']
    return '' if same else 'it was trained on other data'


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


def _tests(folders: Sequence[Path]) -> dict[str, Any]:
    """FAME's NDCG@10 minus its backbone's: the mean over seeds and users, and each seed's own."""
    ranks = []
    for folder in folders:
        with np.load(folder / 'ranks.npz') as file:
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
    title_line: str,
    results: Mapping[str, Mapping[str, Any]],
    tests: Mapping[str, Any],
    folder: Path,
    number: int,
) -> str:
    """The test metrics of both protocols as mean ± standard deviation, and the paired tests."""
    lines = [f'\n{title_line}; mean ± standard deviation of {number} seeds']
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
