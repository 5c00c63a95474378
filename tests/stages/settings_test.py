"""From flags, flags.cfg and the model's class to a run's settings; shared data; own models."""

import contextlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from fixtures import ROOT
from run_fixtures import SMALL_RUN, sequence_text

from fame_jax import stages
from fame_jax.config import FLAGS, flags
from fame_jax.config.data import SYNTHETIC
from fame_jax.config.fields import show
from fame_jax.config.removed import REMOVED
from fame_jax.config.text import TEXT_OPTIONS
from fame_jax.data import synthetic
from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.models.fame import FAME
from fame_jax.models.sasrec import SASRec
from fame_jax.stages import settings
from fame_jax.text.options import TextOptions

TINY = ['--progress=none', '--synthetic=users=50,items=40']
ROWS = ['--max_length=10', '--row_length=16']


def complete(*argv):
    """The settings and the module of a command."""
    return settings.complete(flags.parse(argv))


def prepare(folder, *argv):
    assert main([*TINY, *argv, '--stages=prepare', f'--workdir={folder}']) == 0


def stored(folder):
    """The values in a run's flags.cfg by flag name."""
    return flags.read(folder / 'flags.cfg')


def refused(*argv):
    """The one line with which main refuses a command."""
    with pytest.raises(UserError) as error:
        stages.open_run(flags.parse(argv))
    assert '\n' not in str(error.value)
    return str(error.value)


# After --stages=prepare.


def test_training_flags_count_after_prepare(tmp_path):
    prepare(tmp_path, '--num_blocks=1', '--pretrain_epochs=3')
    later = {
        **{'pretrain_epochs': 4, 'learning_rate': 0.5, 'seed': 3, 'max_length': 7},
        **{'num_heads': 1, 'loss': 'bce', 'loss_chunk': ('-1', '0'), 'long_histories': 'last'},
    }
    argv = [f'--{name}={show(value)}' for name, value in later.items()]
    with contextlib.closing(stages.open_run(flags.parse([f'--workdir={tmp_path}', *argv]))) as run:
        run.begin_writing()
    values = run.config.flat()
    assert {name: values[name] for name in later} == later
    assert run.module('pretrain') == SASRec(num_items=40, num_blocks=1, num_heads=1, max_length=7)
    assert {name: stored(tmp_path)[name] for name in later} == later


def test_flags_given_at_prepare_need_not_be_repeated(tmp_path):
    once = ['--width=8', '--pretrain_epochs=3', '--model_options=gate_scale=one', '--patience=2']
    prepare(tmp_path, *once)
    for _ in range(2):
        config, model = complete(f'--workdir={tmp_path}', '--stages=pretrain')
        assert (model.width, model.gate_scale) == (8, 'one')
        assert (config.training.pretrain_epochs, config.training.patience) == (3, 2)
        assert config.data.synthetic_options['users'] == 50
        assert main([f'--workdir={tmp_path}', '--stages=prepare', '--progress=none']) == 0


def test_a_reading_given_after_prepare_sets_its_options(tmp_path):
    prepare(tmp_path)
    _, model = complete(f'--workdir={tmp_path}', '--reading=paper', '--stages=pretrain')
    paper = FAME.readings['paper']
    assert {name: getattr(model, name) for name in paper} == dict(paper)
    assert paper.items() - registry.options(FAME).items()


@pytest.mark.parametrize(
    ('flag', 'there'),
    [
        ('--k_core=3', '5'),
        ('--min_rating=2.0', '0.0'),
        ('--synthetic=seed=9', '0'),
        ('--synthetic=users=51', '50'),
    ],
)
def test_data_flags_may_not_change_after_prepare(flag, there, tmp_path):
    prepare(tmp_path)
    before = (tmp_path / 'flags.cfg').read_text()
    for stage in ('prepare', 'pretrain'):
        line = refused(f'--workdir={tmp_path}', f'--stages={stage}', flag)
        assert f'{flag} (there: {there})' in line and str(tmp_path) in line
    assert (tmp_path / 'flags.cfg').read_text() == before


# After training.


@pytest.mark.parametrize(
    ('flag', 'there'),
    [
        ('--seed=1', '0'),
        ('--pretrain_epochs=9', '1'),
        ('--learning_rate=0.5', '0.001'),
        ('--row_length=32', '16'),
        ('--num_experts=3', '2'),
        ('--model_options=gate_scale=one', 'heads'),
        ('--reading=paper', ''),
        ('--loss=bce', 'ce'),
        ('--synthetic=seed=9', '0'),
    ],
)
def test_flags_of_the_run_may_not_change_after_training(flag, there, trained):
    before = (trained / 'flags.cfg').read_text()
    for stage in ('pretrain', 'evaluate', 'recommend'):
        line = refused(f'--workdir={trained}', f'--stages={stage}', flag)
        assert f'{flag} (there: {there})' in line and str(trained) in line
    assert (trained / 'flags.cfg').read_text() == before


def test_another_model_in_the_folder_of_a_trained_run(trained):
    line = refused(f'--workdir={trained}', '--model=sasrec', '--stages=pretrain')
    # Not the settings that follow from the model.
    assert '--model=sasrec (there: fame);' in line and line.count('there:') == 1


def test_flags_that_do_not_change_results_are_free_after_training(trained):
    argv = ['--steps_per_dispatch=3', '--checkpoint_seconds=1', '--top_k=3', '--data_parallel=2']
    config, _ = complete(f'--workdir={trained}', '--stages=evaluate', *argv)
    assert (config.training.steps_per_dispatch, config.devices.data_parallel) == (3, 2)


# Data shared by --prepared.


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """The folder of a run whose data are prepared."""
    folder = tmp_path_factory.mktemp('shared') / 'data'
    prepare(folder, '--synthetic=seed=4')
    return folder


def test_data_flags_are_those_of_the_prepared_run(shared, tmp_path):
    config, _ = complete(f'--prepared={shared}', f'--workdir={tmp_path}')
    expected = {'users': 50, 'items': 40, 'facets': 2, 'values': 8, 'seed': 4}
    assert config.data.synthetic_options == expected
    complete(f'--prepared={shared}', f'--workdir={tmp_path}', '--synthetic=seed=4')
    line = refused(f'--prepared={shared}', f'--workdir={tmp_path}', '--synthetic=seed=5')
    assert '--synthetic=seed=5 (there: 4)' in line and f'--prepared={shared}' in line
    line = refused(f'--prepared={shared}', f'--workdir={tmp_path}', '--dataset=toys', '--k_core=3')
    assert '--dataset=toys (there: synthetic)' in line and '--k_core=3 (there: 5)' in line


def test_two_runs_train_on_the_data_of_a_third(shared, tmp_path):
    small = ['--model=sasrec', '--width=8', '--num_blocks=1', '--pretrain_epochs=1', *ROWS]
    small += [f'--prepared={shared}', '--progress=none', '--stages=prepare,pretrain,evaluate']
    results = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        assert main([*small, f'--seed={seed}', f'--workdir={folder}']) == 0
        results.append(json.loads((folder / 'results.json').read_text()))
        assert not (folder / 'dataset').exists() and not (folder / 'item_graph.npz').exists()
        # Later commands need neither --prepared nor the other flags.
        config, _ = complete(f'--workdir={folder}', '--stages=recommend')
        assert config.data.prepared == str(shared)
    fingerprint = json.loads((shared / 'dataset' / 'dataset.json').read_text())['fingerprint']
    assert [one['card']['dataset']['fingerprint'] for one in results] == [fingerprint] * 2
    assert results[0]['results']['pretrain'] != results[1]['results']['pretrain']
    for name in ('popularity', 'item_graph'):
        assert results[0]['results'][name] == results[1]['results'][name]
    assert (shared / 'item_graph.npz').is_file()


def test_prepared_data_do_not_replace_those_of_the_folder(shared, tmp_path):
    prepare(tmp_path)
    line = refused(f'--workdir={tmp_path}', f'--prepared={shared}', '--stages=pretrain')
    assert f'--prepared={shared} (there: )' in line


def test_a_prepared_folder_without_data(tmp_path, capsys):
    argv = [f'--prepared={tmp_path}/none', f'--workdir={tmp_path}/run', '--progress=none']
    for stage, more in itertools.product(('prepare', 'pretrain'), ([], ['--dataset=scientific'])):
        assert main([*argv, f'--stages={stage}', *more]) == 2
        error = capsys.readouterr().err
        assert f'{tmp_path}/none' in error and 'holds no prepared data' in error
        assert error.count('\n') == 1


# A model of the user's own.

MEAN_POOL = '''
from typing import ClassVar

import jax.numpy as jnp

from fame_jax.models.item_model import ItemModel


class MeanPool(ItemModel):
    """The query is the mean of the prefix, in which older items count less."""

    decay: float = 1.0
    title: ClassVar[str] = 'Mean pooling'

    def __call__(self, tokens_BL, positions_BL, segments_BL, *, train=False, last=False):
        row_BLD = self.embed_items(tokens_BL)
        distance_BQS = positions_BL[:, :, None] - positions_BL[:, None, :]
        same_BQS = segments_BL[:, :, None] == segments_BL[:, None, :]
        weight_BQS = jnp.where(same_BQS & (distance_BQS >= 0), self.decay ** abs(distance_BQS), 0)
        query_BQD = jnp.einsum('BQS,BSD->BQD', weight_BQS, row_BLD)
        return self.comparable(query_BQD[:, -1:] if last else query_BQD, self.temperature), {}
'''


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A folder with models_of_mine.py, which no earlier test has imported."""
    folder = tmp_path / 'code'
    folder.mkdir()
    name = f'models_of_{re.sub("[^a-z0-9]", "_", tmp_path.name.lower())}'
    (folder / f'{name}.py').write_text(MEAN_POOL)
    return folder, f'{name}:MeanPool'


def test_a_model_of_ones_own_is_trained_from_the_command_line(
    own_model, tmp_path, monkeypatch, capsys
):
    folder, name = own_model
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    argv = [*TINY, *ROWS, '--width=8', f'--model={name}', '--pretrain_epochs=1']
    run = f'--workdir={tmp_path / "run"}'
    assert main([*argv, '--model_options=decay=.5', run]) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())['results']
    assert results['pretrain']['model'] == 'Mean pooling (width 8, decay 0.5)'
    values = stored(tmp_path / 'run')
    assert (values['model'], values['model_options']) == (name, ('decay=0.5',))
    # Later commands take the model from flags.cfg.
    assert main([run, '--stages=recommend', '--progress=none']) == 0
    lines = (tmp_path / 'run' / 'recommendations.jsonl').read_text().splitlines()
    assert len(lines) == 50
    assert 'MeanPool' in refused(run, '--model_options=decai=.5') + refused(run, f'--model={name}x')
    assert '(there: 0.5)' in refused(run, '--model_options=decay=.4')
    # A class that has changed since it was trained is refused, also where nothing is left to train.
    source = (tmp_path / 'run' / 'model_source.py').read_text()
    assert source.startswith('class MeanPool') and 'abs(distance_BQS)' in source
    (tmp_path / 'run' / 'model_source.py').write_text(source.replace('abs', 'round'))
    for stage in ('pretrain', 'evaluate', 'recommend'):
        capsys.readouterr()
        assert main([run, f'--stages={stage}']) == 2
        assert 'has changed since' in capsys.readouterr().err


def test_a_model_on_the_python_path(own_model, tmp_path, monkeypatch):
    folder, name = own_model
    monkeypatch.chdir(tmp_path)
    assert 'PYTHONPATH' in refused(*TINY, f'--model={name}', f'--workdir={tmp_path / "run"}')
    monkeypatch.syspath_prepend(folder)
    config, model = complete(*TINY, f'--model={name}', '--width=8')
    assert (type(model).title, model.width) == ('Mean pooling', 8)
    assert config.run.stages == ('prepare', 'pretrain', 'evaluate')
    assert config.run.workdir == 'runs/synthetic_MeanPool'


# Flags without effect.


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        ('--model=gru4rec --num_heads=7', ['--num_heads=7', 'GRU4Rec has no option num_heads']),
        ('--model=sasrec --num_experts=4', ['--num_experts=4', 'SASRec has no option']),
        ('--model=gru4rec --positions=start', ['--positions=start', 'GRU4Rec']),
        ('--model=bert4rec --loss=bce', ['--loss=bce', '--model=bert4rec']),
        ('--model=sasrec --backbone=scratch', ['--backbone=scratch', '--model=sasrec']),
        ('--model=sasrec --model_options=crop_share=.1', ['crop_share=', 'SASRec']),
        ('--model=sasrec --reading=paper', ['--reading=paper', 'SASRec']),
        ('--model=sasrec --stages=finetune', ['--model=sasrec', 'finetune']),
        ('--model=core --model_parallel=2', ['--model_parallel=2', '--model=core']),
        ('--facets=brand', ['--facets', '--item_init=text']),
        ('--model=bert4rec --future_targets=1,.5', ['--future_targets=1,.5', 'loss of its own']),
        (
            '--model=fame_bert4rec --finetune_future_targets=1,.5',
            ['--finetune_future_targets=1,.5'],
        ),
        ('--model=msgifsr --seen_weight=3', ['--seen_weight=3', '--model=msgifsr']),
        ('--model=bsarec --seen_weight=3', ['--seen_weight=3', '--model=bsarec']),
        ('--model=sasrec --finetune_future_targets=1,.5', ['SASRec, which has no stage finetune']),
        ('--model=sasrec --finetune_dropout=.5', ['--finetune_dropout=0.5', 'no stage finetune']),
        ('--num_negatives=5', ['--num_negatives=5', '--loss']),
    ],
)
def test_a_flag_without_effect_is_refused(argv, words, tmp_path):
    line = refused(*argv.split(), f'--workdir={tmp_path / "run"}')
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        ('--stages=recommend --user=u3', ['--user=u3', 'add the stage explain']),
        ('--stages=recommend --similar_items=7', ['--similar_items=7', 'add the stage similar']),
        ('--stages=explain --similar_items=7', ['--similar_items=7']),
        ('--stages=export --top_k=5', ['--top_k=5', 'recommend or similar or explain']),
        ('--stages=report --nofilter_seen', ['--filter_seen=false']),
        ('--stages=explain --user=u3 --histories=h', ['--user=u3 and --histories=h', 'explained']),
        ('--stages=recommend --shuffle_histories=all_but_last', ['add the stage evaluate']),
        (
            '--model=sasrec --similarity=dot --temperature=.5',
            ['--temperature=0.5', 'similarity=dot'],
        ),
    ],
)
def test_a_flag_that_no_stage_reads_is_refused(argv, words, tmp_path):
    line = refused(*argv.split(), f'--workdir={tmp_path / "run"}')
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    'argv',
    [
        '--stages=recommend,explain --user=u3 --top_k=3',
        '--stages=prepare,pretrain,evaluate --top_k=3',  # a flag file for later commands too
        '--model=sasrec --similarity=dot --temperature=.07',  # the default
        '--model=sasrec --temperature=.5',
    ],
)
def test_a_flag_that_a_stage_reads_is_not(argv, tmp_path):
    complete(*argv.split(), f'--workdir={tmp_path / "run"}')


def test_advice_for_another_model_keeps_the_stages(tmp_path):
    argv = ('--flagfile=toys_plus.cfg', '--model=sasrec', f'--workdir={tmp_path / "run"}')
    assert refused(*argv).endswith('use --stages=prepare,text,pretrain,evaluate')
    complete(*argv, '--stages=prepare,text,pretrain,evaluate')
    argv = ('--flagfile=toys_paper.cfg', '--model=sasrec', f'--workdir={tmp_path / "run"}')
    assert refused(*argv).endswith('after a flag file that gives one add --reading=')
    complete('--num_blocks=2', '--model=gru4rec', '--num_blocks=')
    assert '--num_blocks= takes back' in refused('--num_blocks=2', '--model=gru4rec')


def test_a_flag_file_of_fame_serves_another_model(tmp_path):
    """What it says of the second stage does not count; FAME's own option is taken back by name."""
    argv = ('--flagfile=toys_best.cfg', '--model=sasrec', f'--workdir={tmp_path / "run"}')
    line = refused(*argv)
    assert 'SASRec has no option head_loss' in line
    assert line.endswith('--model_options=head_loss= takes back that of a flag file')
    config, model = complete(*argv, '--model_options=head_loss=')
    assert (model.width, config.loss.shares('pretrain')) == (128, (1, 0.3, 0.1))
    assert config.run.stages == ('prepare', 'pretrain', 'evaluate')


@pytest.mark.parametrize('schedule', ['constant', 'cosine'])
def test_a_cosine_keeps_its_number_of_epochs(schedule, tmp_path):
    """The rates of the epochs that were trained would have been others."""
    (tmp_path / 'checkpoints' / 'pretrain' / '1').mkdir(parents=True)
    before, _ = complete(*TINY, '--model=sasrec', '--patience=3', f'--schedule={schedule}')
    longer = before.replace(pretrain_epochs=before.training.pretrain_epochs + 1, patience=4)
    grown = {'patience'} | ({'pretrain_epochs'} if schedule == 'constant' else set())
    assert set(settings._grown_limits(longer, before, tmp_path)) == grown


def test_a_title_has_the_training_options_of_its_stage():
    config, model = complete(
        *TINY, '--future_targets=2,.5', '--finetune_future_targets=1', '--seen_weight=3', '--ema=.9'
    )
    pretrain, finetune = (
        settings.label(config, module, stage)
        for module, stage in ((model.backbone_module(), 'pretrain'), (model, 'finetune'))
    )
    assert pretrain == 'SASRec (future_targets 2,0.5, seen_weight 3, ema 0.9)'
    assert finetune == 'FAME (H 2, N 8, seen_weight 3, ema 0.9)'
    config, model = complete(*TINY, '--model=sasrec', '--schedule=cosine')
    assert settings.label(config, model, 'pretrain') == 'SASRec (schedule cosine)'


# Defaults and flag files.


@pytest.mark.parametrize('path', sorted((ROOT / 'experiments').glob('*.cfg')), ids=lambda p: p.stem)
def test_a_flag_file_builds_its_model(path, tmp_path):
    given = flags.parse([f'--flagfile={path}', f'--workdir={tmp_path}'])
    config, model = settings.complete(given)
    assert type(model) is registry.find(given.get('model'))
    options = {**type(model).readings.get(given.get('reading'), {}), **config.model.options}
    assert options.keys() <= registry.options(type(model)).keys()
    for name in options.keys() & given.values.keys():
        assert getattr(model, name) == given.values[name]
    if model.backbone:
        assert model.backbone_module().width == model.width


def test_the_recipe_of_a_model_counts_unless_a_flag_is_given():
    recipe = registry.find('bert4rec').recipe
    assert recipe['pretrain_epochs'] != FLAGS['pretrain_epochs'].default
    config, _ = complete('--model=bert4rec')
    assert config.training.pretrain_epochs == recipe['pretrain_epochs']
    config, _ = complete('--model=bert4rec', '--pretrain_epochs=7')
    assert config.training.pretrain_epochs == 7


@pytest.mark.parametrize('name, num_negatives', [('hstu', 512), ('esasrec', 256)])
def test_models_with_a_sampled_loss_take_cross_entropy_too(name, num_negatives):
    loss = complete(f'--model={name}')[0].loss
    assert (loss.loss, loss.num_negatives) == ('sampled', num_negatives)
    assert complete(f'--model={name}', '--loss=ce')[0].loss.loss == 'ce'


def test_defaults_of_text_options_are_those_of_the_flag():
    assert TextOptions.parse(f'{name}={value}' for name, value in TEXT_OPTIONS.items()) == (
        TextOptions()
    )
    assert TEXT_OPTIONS.keys() == TextOptions.__dataclass_fields__.keys()


def test_defaults_of_the_synthetic_data_are_those_of_the_flag():
    defaults = {name: default for name, (default, *_) in SYNTHETIC.items()}
    assert defaults.keys() == set(synthetic.OPTIONS)
    one, other = synthetic.generate(), synthetic.generate(**defaults)
    assert one.fingerprint() == other.fingerprint()
    assert (one.num_users, one.item_facets.shape[1]) == (defaults['users'], defaults['facets'])


# Runs of version 0.1.


def former_flags(folder):
    """A run's flags.cfg as version 0.1 wrote it: flat, with all flags of then."""
    new = ('prepared', 'columns', 'synthetic', 'text_options', 'model_options', 'loss_chunk')
    values = {name: default for name, (default, _) in REMOVED.items()} | {'reading': 'warm'}
    kept = {n: show(v) for n, v in stored(folder).items() if n not in (*new, 'backbone', 'reading')}
    return '# The run\n' + ''.join(f'--{n}={v}\n' for n, v in (values | kept).items())


def test_a_finished_run_of_version_0_1_is_evaluated_again(tmp_path):
    """Its flags.cfg has flags that are gone, and no model options."""
    (tmp_path / 'log.txt').write_text(sequence_text())
    first, later = tmp_path / 'first', tmp_path / 'later'
    argv = [flag for flag in SMALL_RUN if 'synthetic' not in flag and 'experts' not in flag]
    argv += ['--model=sasrec', f'--dataset={tmp_path}/log.txt', f'--workdir={first}']
    assert main(argv) == 0
    text = former_flags(first)
    shutil.copytree(first, later)
    (later / 'flags.cfg').write_text(text)
    (later / 'results.json').unlink()
    assert '--attention_bias=true' in text and '--model_options' not in text
    assert main([f'--workdir={later}', '--stages=evaluate', '--progress=none']) == 0
    one, other = (json.loads((f / 'results.json').read_text())['results'] for f in (first, later))
    assert one == other
    assert Path(stored(later).pop('workdir')) == later
    line = refused(f'--workdir={later}', '--model_options=attention_scale=model')
    assert '--model_options=attention_scale=model (there: head)' in line
