"""Every flag acts, and only where it should: on the data, the layout, the start, or the first step.

A command is observed without a compiler: its data set, the item texts' arguments, the batches of
two epochs, the limits, the keys and values from which a stage starts, and the traced programs of
initialisation (with one forward pass), surgery and the first step. A flag's other value has to
change exactly the parts that CASES names. A new flag without a case fails
`test_every_flag_has_a_case`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re

import jax
import numpy as np
import pytest
from fixtures import ROOT

from fame_jax import stages
from fame_jax.config import FLAGS, flags
from fame_jax.config.model import FLAGS_OF_THEIR_OWN
from fame_jax.models import registry, surgery
from fame_jax.models.fame import FAME
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.stages import train
from fame_jax.stages.context import abstract_params
from fame_jax.text import facet_objective
from fame_jax.training import loop

USERS, ITEMS = 14, 9
GENRES = 'aabbcdddd'  # c is rare, d is common
BASE = {
    **{'width': 8, 'num_heads': 2, 'num_experts': 3, 'num_blocks': 1, 'row_length': 12},
    **{'max_length': 6, 'rows_per_step': 2, 'k_core': 0, 'steps_per_dispatch': 1},
    'progress': 'none',
    'columns': 'user:user,item:item,time:turn,rating:stars',
}
TEXT = {'item_init': 'text', 'items': '{folder}/items.csv', 'facets': 'brand'}
ROWS = {'item_init': '{folder}/rows.npy'}
SAMPLED = {'loss': 'sampled', 'num_negatives': 16}


@dataclasses.dataclass(frozen=True)
class Case:
    """Another value of a flag, and the parts of a command that it changes.

    Fields:
      value: as on the command line; {folder} is that of the input files.
      changes: names of parts, those of one stage after its name.
      given: flags of both commands that are compared, where the flag needs others to act.
      stages: the trained stages that are observed.
    """

    value: object
    changes: str
    given: dict = dataclasses.field(default_factory=dict)
    stages: tuple[str, ...] = ('finetune',)


BOTH = ('pretrain', 'finetune')
SHAPES = 'init start step surgery'
CASES = {
    # What is run.
    'seed': Case(1, 'layout init_key step_key'),
    'progress': Case('lines', ''),
    # Data.
    'dataset': Case('{folder}/other.csv', 'data layout'),
    'data_dir': Case('{folder}', ''),
    'min_rating': Case(3, 'data layout'),
    'k_core': Case(5, 'data layout'),
    'max_user_actions': Case(4, 'data layout'),
    'duplicates': Case('drop', 'data layout', {'columns': 'user:user,item:sku,time:price'}),
    'max_length': Case(3, f'layout {SHAPES}'),
    'long_histories': Case('last', 'layout', {'max_length': 3}),
    'columns=user': Case('user:buyer', 'data layout'),
    'columns=item': Case('item:sku', f'data layout {SHAPES}'),
    'columns=time': Case('time:back', 'data layout'),
    'columns=rating': Case('rating:price', 'data layout', {'min_rating': 2}),
    'columns=item_file_id': Case('item_file_id:code', 'vectors labels', TEXT),
    'split': Case('time', 'data layout'),
    'split_at': Case('.5', 'data layout', {'split': 'time'}),
    'split_targets': Case('successive', 'data', {'split': 'time'}),
    # Texts.
    'items': Case('{folder}/items2.csv', 'vectors', TEXT),
    'text_fields': Case('brand', 'vectors', TEXT),
    'facets': Case('genre', 'heads labels', TEXT),
    'text_encoder': Case('{folder}/texts.npy', 'vectors', TEXT),
    'item_init': Case('{folder}/rows.npy', 'start'),
    'item_scale': Case(0.5, 'start', ROWS),
    'unseen_items': Case('kept', 'step', ROWS),
    # The model.
    'model': Case('fame_bert4rec', f'layout limits {SHAPES}'),
    'reading': Case('paper', SHAPES),
    'width': Case(4, SHAPES),
    'num_blocks': Case(2, SHAPES),
    'num_heads': Case(4, SHAPES),
    'num_experts': Case(2, SHAPES),
    'dropout': Case(0.25, 'step'),
    'positions': Case('start', SHAPES),
    'similarity': Case('dot', 'init step'),
    'temperature': Case(0.5, 'init step'),
    'model_options=attention_bias': Case('false', SHAPES),
    'model_options=attention_scale': Case('model', 'init step'),
    'model_options=routing': Case('inputs', SHAPES),
    'model_options=active_experts': Case(2, 'init step'),
    'model_options=balance_weight': Case(0.1, 'step', {'model_options': 'active_experts=2'}),
    'model_options=remat': Case('true', 'step'),  # the same results, see experts_test.py
    'model_options=attention_residual': Case('none', SHAPES),
    'model_options=output_projection': Case('keep', SHAPES),
    'model_options=facet_init': Case('random', 'init'),
    'model_options=gate_scale': Case('one', 'init step'),
    'model_options=ffn_shared': Case('false', SHAPES),
    'model_options=expert_init': Case('random', 'surgery'),
    'model_options=head_loss': Case(0.3, 'step'),
    'model_options=expert_noise': Case(0.5, 'surgery'),
    # The loss.
    'loss': Case('bce', 'step'),
    'num_negatives': Case(3, 'step', {'loss': 'bce'}),
    'negatives': Case('popularity', 'step counts', SAMPLED),
    'future_targets': Case('1,.5', 'pretrain.step finetune.step', stages=BOTH),
    'finetune_future_targets': Case('1,.5', 'finetune.step', stages=BOTH),
    'seen_weight': Case(3, 'pretrain.step finetune.step', stages=BOTH),
    'loss_chunk': Case('2,3', 'step'),  # the same results but for rounding, see chunked_test.py
    # Training.
    'row_length': Case(7, 'layout step'),
    'rows_per_step': Case(3, 'layout step'),
    'pretrain_epochs': Case(7, 'pretrain.limits', stages=BOTH),
    'finetune_epochs': Case(7, 'finetune.limits', stages=BOTH),
    'select_on': Case('unmasked', 'selection'),
    'validation_users': Case(3, 'selection'),
    'patience': Case(2, 'pretrain.limits finetune.limits', stages=BOTH),
    'learning_rate': Case(0.5, 'pretrain.step', stages=BOTH),
    'finetune_learning_rate': Case(0.5, 'finetune.step', stages=BOTH),
    'schedule': Case('cosine', 'pretrain.step finetune.step', stages=BOTH),
    'warmup_epochs': Case(0.5, 'pretrain.step finetune.step', stages=BOTH),
    'ema': Case(0.9, 'pretrain.step finetune.step', stages=BOTH),
    'finetune_dropout': Case(0.25, 'finetune.step', stages=BOTH),
    'weight_decay': Case(0.5, 'pretrain.step finetune.step', stages=BOTH),
    'dtype': Case('bfloat16', 'init step'),
    'steps_per_dispatch': Case(2, 'block'),
    'checkpoint_seconds': Case(0.5, 'saving'),
    # Devices.
    'cache_dir': Case('{folder}/cache', ''),
    'profile': Case('{folder}/profile', ''),
}
# Options of generated data and of the texts' training, all of which change one part.
SYNTHETIC = {'users': 30, 'items': 21, 'facets': 1, 'values': 3, 'seed': 5}
TEXT_OPTIONS = {
    **{'epochs': 3, 'learning_rate': 0.5, 'labels_per_step': 3, 'items_per_label': 3},
    **{'temperature': 0.5, 'inner_width': 5, 'dropout': 0.5, 'alternation': 'sum'},
    **{'shuffled_labels': 'true', 'rarest_label': 1, 'commonest_label': 0.5},
}
CASES |= {
    f'synthetic={name}': Case(f'{name}={value}', 'data', {'dataset': 'synthetic', 'columns': ''})
    for name, value in SYNTHETIC.items()
}
CASES |= {
    f'text_options={name}': Case(
        f'{name}={value}',
        'options labels' if name in ('rarest_label', 'commonest_label') else 'options',
        {**TEXT, 'facets': 'genre'},
    )
    for name, value in TEXT_OPTIONS.items()
}
# Flags that a test elsewhere shows to act, by the name of that test.
ELSEWHERE = {
    'stages': 'test_without_fine_tuning_the_best_backbone_is_served',
    'workdir': 'test_several_seeds_are_several_runs',
    'prepared': 'test_two_runs_train_on_the_data_of_a_third',
    'backbone': 'test_another_runs_best_backbone_is_grown',
    'histories': 'test_histories_of_a_file_keep_their_order',
    'top_k': 'test_every_user_of_the_data_set',
    'similar_items': 'test_some_items_are_chosen',
    'filter_seen': 'test_without_a_filter_the_items_of_the_history_are_recommended_too',
    'allow_items': 'test_allowed_and_denied_items',
    'deny_items': 'test_allowed_and_denied_items',
    'user': 'test_the_best_epoch_is_explained',
    'shuffle_histories': 'test_the_order_test_stands_beside_the_plain_figures',
    'out': 'test_out_is_a_file_of_one_stage_or_a_folder',
    'data_parallel': 'test_a_run_on_a_mesh_is_that_of_one_device',
    'model_parallel': 'test_a_run_on_a_mesh_is_that_of_one_device',
    'distributed': 'test_two_processes_are_one_run',
    'seeds': 'test_one_after_the_other_they_have_the_bits_of_their_runs',
    'members': 'test_a_member_is_the_run_of_its_seed',
    'text_path': 'test_a_run_with_a_text_path_ranks_and_serves_the_folded_table',
    'text_path_below': 'test_a_run_with_a_text_path_ranks_and_serves_the_folded_table',
    'sweep': 'test_the_best_setting_by_validation_is_evaluated',
    'sweep_halving': 'test_halving_ends_the_worse_settings_early',
    'append': 'test_an_update_is_a_run_with_all_data',
    'from_run': 'test_an_update_is_a_run_with_all_data',
    'replay': 'test_the_share_of_old_windows',
    'track': 'test_a_run_is_one_tracked_run_of_all_its_stages',
}


def names_of(flag):
    """A flag, or the pairs of a flag of pairs."""
    if flag == 'model_options':
        own = [name for name in registry.options(FAME) if name not in FLAGS_OF_THEIR_OWN]
        return [f'{flag}={name}' for name in own]
    return [f'{flag}={name}' for name in FLAGS[flag].metadata.get('names', ())] or [flag]


def test_every_flag_has_a_case():
    """Give a new flag another value in CASES, or the name of its test in ELSEWHERE."""
    wanted = [name for flag in FLAGS for name in names_of(flag)]
    assert sorted(wanted) == sorted([*CASES, *ELSEWHERE])


def test_the_tests_elsewhere_exist():
    sources = ''.join(path.read_text() for path in (ROOT / 'tests').rglob('*_test.py'))
    for name in ELSEWHERE.values():
        assert f'def {name}(' in sources, name


# Input files.


def write_inputs(folder):
    """A log with two columns of each role, another log, item files, and rows of vectors."""
    draw = np.random.default_rng(0)
    lines, number = [], 0
    for user in range(USERS):
        # Item 9 is at the end of histories alone: it is in no training part.
        items = [*(draw.permutation(ITEMS - 1)[: 4 + user % 4] + 1), *([9] if user % 2 else [])]
        for item in items:
            number += 1
            values = [f'u{user}', item, number, 1 + number % 5]
            lines.append([*values, f'b{user // 2}', item % 7, 1000 - number, 1 + number % 3])
    head = 'user,item,turn,stars,buyer,sku,back,price\n'
    for name, rows in (('log', lines), ('other', [line for line in lines if line[2] % 9])):
        (folder / f'{name}.csv').write_text(
            head + ''.join(','.join(map(str, row)) + '\n' for row in rows)
        )
    for name, words in (('items', 4), ('items2', 3)):
        rows = [
            f'{v},thing{v} word{v % words},brand{v % 5},{GENRES[v - 1]},{ITEMS + 1 - v}\n'
            for v in range(1, ITEMS + 1)
        ]
        (folder / f'{name}.csv').write_text('item,title,brand,genre,code\n' + ''.join(rows))
    rows = draw.normal(size=(ITEMS + 1, BASE['width'])).astype(np.float32)
    np.save(folder / 'rows.npy', rows)
    np.save(folder / 'texts.npy', rows)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inputs')
    write_inputs(folder)
    return folder


# Observation.


def digest(tree):
    """A checksum of all arrays of a tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        total.update(f'{array.dtype}{array.shape}'.encode() + array.tobytes())
    return total.hexdigest()


def traced(function, *arguments):
    """The program of a function, without the addresses of Python's objects, and its constants."""
    program = jax.make_jaxpr(function)(*arguments)
    text = re.sub(r' at 0x[0-9a-f]+|id=\d+', '', str(program))
    return hashlib.sha256(text.encode()).hexdigest(), digest(program.consts)


class UncompiledProgram:
    """Takes the place of a stage's program."""

    def __init__(self, step, size, mesh, packs):
        self.step, self.size = step, size


class TextArguments(BaseException):
    """Ends the stage text before it trains."""


def observe_text(run, patch):
    """What the training of the texts takes, which is not run."""
    found = {}

    def fit_heads(text_VE, heads, facets, **options):
        options.pop('report')
        labels = [(facet.labels, facet.label_VS.tolist()) for facet in facets]
        vectors = digest(text_VE)
        found.update(vectors=vectors, heads=heads, labels=labels, options=str(options))
        raise TextArguments

    patch.setattr(facet_objective, 'fit_heads', fit_heads)
    with pytest.raises(TextArguments):
        stages.STAGES['text'](run)
    return found


def observe_stage(run, stage, patch):
    """The parts of a trained stage, whose tables start from zeros where nothing fills them."""
    seen, init_keys = [], []

    def fit(**arguments):
        seen.append(arguments)
        return arguments['state'].params, loop.Progress()

    def init_sharded(init, mesh):
        def zeros(*arguments):
            init_keys.extend(filter(is_key, arguments))
            like = jax.eval_shape(init, *arguments)
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)

        return zeros

    patch.setattr(loop, 'fit', fit)
    patch.setattr(train, 'precompile', lambda context, stage: None)
    patch.setattr(train, 'Program', UncompiledProgram)
    patch.setattr(mesh_lib, 'init_sharded', init_sharded)
    stages.STAGES[stage](run)
    (found,) = seen
    epochs = [list(found['epochs'](number).batches) for number in (0, 1)]
    state, limits, step = found['state'], found['limits'], found['program'].step
    module, key = run.module(stage), jax.random.key(0)
    parts = {
        'layout': digest(epochs),
        'limits': (limits.epochs, limits.patience),
        'saving': limits.checkpoint_seconds,
        'selection': (found['select_on'], str(run.selection_users)),
        'init_key': digest(init_keys),
        'step_key': digest(found['key']),
        'init': traced(functools.partial(registry.init_params, module), key),
        'start': digest(state.params),
        'step': traced(step, jax.eval_shape(lambda x: x, state), epochs[0][0], key),
        'counts': digest(step),
        'block': found['program'].size,
    }
    if stage == 'finetune':
        backbone = abstract_params(run.module('pretrain'))
        plan = module.surgery_plan(key)
        transplant = functools.partial(surgery.transplant, plan=plan)
        parts['surgery'] = traced(transplant, backbone, abstract_params(module))
    return parts


def is_key(x):
    return jax.dtypes.issubdtype(getattr(x, 'dtype', float), jax.dtypes.prng_key)


def observe(folder, workdir, stage, given, *more):
    """The parts of a command that trains one stage."""
    values = {'dataset': '{folder}/log.csv', **BASE, **given, 'workdir': workdir}
    if stage == 'finetune':
        values['backbone'] = 'scratch'
    values['stages'] = f'prepare,{stage}' if stage else 'prepare'
    argv = [*(f'--{name}={value}' for name, value in values.items() if value != ''), *more]
    run = stages.open_run(flags.parse([flag.replace('{folder}', str(folder)) for flag in argv]))
    with contextlib.closing(run), pytest.MonkeyPatch.context() as patch:
        stages.STAGES['prepare'](run)
        parts = {'data': run.data.card['fingerprint']}
        if stage == 'text':
            parts |= observe_text(run, patch)
        elif stage:
            parts |= observe_stage(run, stage, patch)
    return parts


@pytest.fixture(scope='module')
def before(folder, tmp_path_factory):
    """(stage, given) -> the parts without the case's flag; each observed once."""
    known = {}

    def parts(stage, given):
        name = str((stage, given))
        if name not in known:
            known[name] = observe(folder, tmp_path_factory.mktemp('before'), stage, given)
        return known[name]

    return parts


def observed_stages(case):
    if 'items' in case.given:
        return ['text']
    return [''] if case.changes == 'data' else case.stages


@pytest.mark.parametrize('name', CASES)
def test_a_flag_changes_these_parts_and_no_others(name, folder, before, tmp_path):
    case, changed = CASES[name], set()
    for stage in observed_stages(case):
        old = before(stage, case.given)
        flag = f'--{name.partition("=")[0]}={case.value}'
        if name.startswith('model_options'):
            flag = f'--{name}={case.value}'
        new = observe(folder, tmp_path / f'run_{stage}', stage, case.given, flag)
        prefix = f'{stage}.' if len(case.stages) > 1 else ''
        changed |= {prefix + part for part in old if old[part] != new[part]}
    assert changed == set(case.changes.split())


@pytest.mark.parametrize('stage', [*BOTH, 'text'])
def test_the_same_command_has_the_same_parts(stage, folder, before, tmp_path):
    given = TEXT if stage == 'text' else {}
    assert observe(folder, tmp_path, stage, given) == before(stage, given)


def test_a_rating_at_the_limit_is_kept(folder, tmp_path):
    """The kept actions are those of the log with a rating of 3 or more, by a loop."""
    given = {**BASE, 'dataset': f'{folder}/log.csv', 'min_rating': 3, 'workdir': tmp_path}
    argv = [f'--{name}={value}' for name, value in given.items()]
    run = stages.open_run(flags.parse([*argv, '--stages=prepare']))
    stages.STAGES['prepare'](run)
    expected = {}
    for line in (folder / 'log.csv').read_text().splitlines()[1:]:
        user, item, _, rating, *_ = line.split(',')
        if int(rating) >= 3:
            expected.setdefault(user, []).append(int(item))
    expected = {user: items for user, items in expected.items() if len(items) >= 3}
    assert {user: list(map(int, items)) for user, items in run.data.histories()} == expected
    limit = [line for line in (folder / 'log.csv').read_text().splitlines() if ',3,b' in line]
    assert limit and len(expected) > 1


# Seeds.


def test_two_seeds_differ_in_initialisation_order_and_dropout(folder, before, tmp_path):
    """Each by itself, in both stages; no two keys of a run are equal."""
    keys = set()
    for stage in BOTH:
        old = before(stage, {})
        new = observe(folder, tmp_path / stage, stage, {}, '--seed=1')
        for part in ('init_key', 'step_key', 'layout'):
            assert old[part] != new[part]
        keys |= {parts[part] for parts in (old, new) for part in ('init_key', 'step_key')}
    assert len(keys) == 2 * 2 * 2


def test_the_seed_of_the_texts(folder, before, tmp_path):
    old, new = before('text', TEXT), observe(folder, tmp_path, 'text', TEXT, '--seed=1')
    assert "'seed': 0" in old['options']
    assert new == old | {'options': old['options'].replace("'seed': 0", "'seed': 1")}
