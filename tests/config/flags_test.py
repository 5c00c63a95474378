"""The command line, flag files, a run's flags.cfg, and flags of version 0.1."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fame_jax
from fame_jax import main
from fame_jax.config import FLAGS, SPELLED, Config, binds, flags, section_of
from fame_jax.config.fields import show
from fame_jax.config.removed import REMOVED
from fame_jax.errors import UserError


def refusal(call, *arguments):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert message and '\n' not in message
    return message


def complete(*argv, stored=(), recipe=(), **facts):
    return flags.complete(flags.parse(argv), dict(stored), dict(recipe), **facts)


@pytest.fixture
def cfg(tmp_path):
    """(text) -> a flag file with it."""

    def write(text, name='a.cfg'):
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        return path

    return write


# There and back.


@pytest.mark.parametrize('name', FLAGS)
def test_a_flag_there_and_back(name, another, cfg):
    value = another(name)
    assert flags.parse([f'--{name}={show(value)}']).values == {name: value}
    if section_of(name) != 'serving':
        config = Config.from_flat(**{name: value})
        stored = flags.read(cfg(flags.text(config)))
        assert stored[name] == value
        assert Config.from_flat(**stored) == config


@given(
    rate=st.floats(0, 10),
    texts=st.lists(st.text(st.characters(exclude_categories=['C', 'Z'])), min_size=1),
)
def test_any_value_there_and_back(rate, texts):
    config = Config.from_flat(learning_rate=rate, dataset=texts[0], facets=tuple(texts))
    lines = [line for line in flags.text(config).split('\n') if line.startswith('--')]
    assert Config.from_flat(**flags.parse(lines).values) == config


def test_flags_cfg_has_defaults_but_not_how_the_run_is_used():
    config = Config.from_flat(workdir='w', top_k=7, cache_dir='c', width=64)
    lines = flags.text(config).splitlines()
    names = {line[2:].split('=')[0] for line in lines if line.startswith('--')}
    bound = {n for n in FLAGS if binds(n) and (FLAGS[n].default is not None or n == 'width')}
    assert names == (bound - {'append', 'from_run', 'replay'}) | {'workdir', 'cache_dir'}
    assert {'--learning_rate=0.001', '--width=64', '--k_core=5', '--loss_chunk=-1,0'} <= {*lines}


# Ways to write a flag.


@pytest.mark.parametrize(
    ('argv', 'values'),
    [
        *((argv, {'seed': 3}) for argv in ('--seed=3', '--seed 3', '-seed=3', '--seed=1 --seed=3')),
        *((argv, {'filter_seen': False}) for argv in ('--nofilter_seen', '--filter_seen=0')),
        (
            '--synthetic=users=9,items=1e3 --synthetic=users=8',
            {'synthetic': ('users=8', 'items=1000')},
        ),
        # A pair without a value takes back that pair, and no pair all of them.
        ('--synthetic=users=9,items=8 --synthetic=users=', {'synthetic': ('items=8',)}),
        ('--synthetic=users=9 --synthetic=users=,seed=1', {'synthetic': ('seed=1',)}),
        ('--synthetic=users=9 --synthetic=', {'synthetic': ()}),
        ('--columns=item:sku,user:u --columns=user:', {'columns': ('item:sku',)}),
        ('--model_options=a=1,b== --model_options=a=', {'model_options': ('b==',)}),
        # So does an empty value where the model decides.
        ('--width=64 --num_blocks=3 --width=', {'num_blocks': 3}),
    ],
)
def test_ways_to_write_a_flag(argv, values):
    assert flags.parse(argv.split()).values == values


@pytest.mark.parametrize(
    ('argv', 'parts'),
    [
        ('--sede=1', ['no flag --sede', 'did you mean --seed?']),
        ('--nodatasets', ['no flag --nodatasets', 'did you mean --dataset?']),
        ('--zzz=1', ['no flag --zzz', '--help lists them']),
        ('seed=1', ['"seed=1" is not a flag']),
        ('--seed', ['Missing value', '--seed']),
        ('--dropout=much', ['--dropout=much']),
        ('--filter_seen=maybe', ['--filter_seen=maybe']),
        ('--seed -1', ['--seed=-1', 'out of range']),
        ('--stages=evalute', ['--stages=evalute', 'did you mean evaluate?']),
        ('--synthetic=users=9 --synthetic=user=', ['--synthetic=user=', 'no flag before it']),
        ('--synthetic=users=', ['--synthetic=users=', 'no flag before it', 'NAME=VALUE']),
        ('--synthetic==9', ['--synthetic==9', 'NAME=VALUE']),
        ('--seed=', ['--seed=']),
        ('--loss=0123456789', ['--loss=0123456789', 'choose from ce, bce, sampled']),
        ('--facets="brand', ['--facets']),
        ('--flagfile', ['--flagfile names no file']),
        ('--flagfile=toyz.cfg', ['no such file', 'did you mean toys.cfg?']),
        ('--flagfile=nowhere/toys.cfg', ['no such file', '--flagfile=toys.cfg']),
    ],
)
def test_a_mistake_is_one_line(argv, parts):
    message = refusal(flags.parse, argv.split())
    for part in parts:
        assert part in message


# Which value wins.


def test_given_then_stored_then_recipe_then_default():
    recipe = {'patience': 1, 'row_length': 100, 'rows_per_step': 2}
    stored = {'patience': 3, 'row_length': 200, 'data_dir': 'old', 'stages': ('prepare',)}
    config = complete('--patience=4', stored=stored, recipe=recipe)
    assert (config.training.patience, config.training.row_length) == (4, 200)
    assert (config.training.rows_per_step, config.training.learning_rate) == (2, 1e-3)
    # A flag that does not bind a run is not taken from it.
    assert (config.data.data_dir, config.run.stages) == ('', ())


def test_a_recipe_with_a_loss_gives_way_to_another_loss_as_a_whole():
    recipe = {'loss': 'sampled', 'num_negatives': 256, 'patience': 1}
    cases = [
        ((), {}, ('sampled', 256)),
        (('--num_negatives=64',), {}, ('sampled', 64)),
        (('--loss=sampled',), {}, ('sampled', 256)),
        (('--loss=ce',), {}, ('ce', 1)),
        (('--loss=bce',), {}, ('bce', 1)),
        ((), {'loss': 'ce'}, ('ce', 1)),
    ]
    for argv, stored, expected in cases:
        config = complete(*argv, stored=stored, recipe=recipe)
        assert (config.loss.loss, config.loss.num_negatives) == expected
        assert config.training.patience == recipe['patience']


def test_pairs_of_all_layers_are_merged():
    stored = {'synthetic': ('users=9',), 'model_options': ('crop_share=0.3', 'remat=false')}
    config = complete('--synthetic=seed=4', '--model_options=crop_share=.4', stored=stored)
    # All pairs are written out, so that flags.cfg has all of them.
    assert config.data.synthetic == ('users=9', 'items=1000', 'facets=2', 'values=8', 'seed=4')
    assert config.model.model_options == ('crop_share=0.4', 'remat=false')


def test_another_model_does_not_take_what_was_stored_for_the_first():
    stored = {'model': 'fame', 'num_experts': 8, 'patience': 9, 'k_core': 3, 'seed': 2}
    config = complete('--model=sasrec', stored=stored)
    assert (config.model.num_experts, config.training.patience) == (None, 5)
    assert (config.data.k_core, config.run.seed) == (3, 2)
    assert complete('--model=fame', stored=stored).training.patience == 9
    # A reading sets options, which the stored ones must not hide.
    config = complete('--reading=paper', stored={**stored, 'model': 'sasrec', 'width': 8})
    assert (config.model.model, config.model.width) == ('sasrec', None)
    assert config.training.patience == 9


def test_a_scale_of_rows_that_was_stored_without_effect_is_no_mistake():
    """Versions before 0.3 accepted it, and their runs are still used."""
    stored = {'item_init': 'random', 'item_scale': 0.3}
    assert complete(stored=stored).text.item_scale == Config().text.item_scale
    assert complete('--item_init=text', stored=stored).text.item_scale == 0.3
    assert complete(stored=stored | {'item_init': 'text'}).text.item_scale == 0.3
    line = refusal(complete, '--item_scale=.3')
    assert line.startswith('--item_scale=0.3 has no effect where --item_init=random; add ')


def test_settings_are_checked_together_when_they_are_complete():
    assert '--max_length=70' in refusal(complete, '--max_length=70')
    assert complete('--max_length=70', recipe={'row_length': 70}).training.row_length == 70
    assert complete('--max_length=70', row_layout='prefixes').data.max_length == 70


@pytest.mark.parametrize(
    ('argv', 'folder'),
    [
        ([], 'runs/synthetic_fame'),
        (['--dataset=/some/log.tsv.gz', '--model=mine.models:MeanPool'], 'runs/log_MeanPool'),
        (['--prepared=runs/toys', '--model=sasrec'], 'runs/toys_sasrec'),
        (['--workdir=here/it/is'], 'here/it/is'),
    ],
)
def test_the_folder_of_a_run(argv, folder):
    assert complete(*argv).run.workdir == flags.parse(argv).workdir == folder


# Flag files.


def test_a_flag_file_stands_for_its_lines(cfg):
    path = cfg('# a lab note\r\n\r\n--seed=4\r\n// also one\n  --width=32 \n--nofilter_seen\n')
    values = {'seed': 4, 'width': 32, 'filter_seen': False}
    assert flags.parse([f'--flagfile={path}']).values == values
    assert flags.parse(['--flagfile', str(path), '--seed=5']).values == values | {'seed': 5}
    assert flags.parse(['--seed=5', f'--flagfile={path}']).values == values
    outer = cfg(f'--flagfile={path}\n--width=16\n', 'outer.cfg')
    assert flags.parse([f'--flagfile={outer}']).values == values | {'width': 16}


@pytest.mark.parametrize(
    ('text', 'parts'),
    [
        ('--seed=4\n--widht=32\n', ['a.cfg:2', 'did you mean --width?']),
        ('--seed=-4\n', ['a.cfg:1', '--seed=-4 is out of range']),
        ('hello\n', ['a.cfg:1', '"hello" is not a flag']),
        ('--flagfile=none.cfg\n', ['--flagfile=none.cfg', 'no such file']),
    ],
)
def test_a_mistake_in_a_flag_file_names_its_line(text, parts, cfg):
    message = refusal(flags.parse, [f'--flagfile={cfg(text)}'])
    for part in parts:
        assert part in message


def test_a_flag_file_that_cannot_be_read(cfg, tmp_path):
    (tmp_path / 'binary.cfg').write_bytes(b'\xff\xfe\x00')
    assert 'not text' in refusal(flags.parse, [f'--flagfile={tmp_path}/binary.cfg'])
    assert str(tmp_path) in refusal(flags.parse, [f'--flagfile={tmp_path}'])
    path = cfg(f'--flagfile={tmp_path}/a.cfg\n')
    assert 'includes itself' in refusal(flags.parse, [f'--flagfile={path}'])
    assert 'none.cfg' in refusal(flags.read, tmp_path / 'none.cfg')


# Flags of version 0.1.


@pytest.mark.parametrize('name', REMOVED)
def test_a_removed_flag_is_refused_with_its_replacement(name, cfg):
    default, use = REMOVED[name]
    for argv in ([f'--{name}={default or "x"}'], [f'--{name}', default or 'x']):
        message = refusal(flags.parse, argv)
        assert f'was --{name}; ' in message
        assert use.replace('{}', default or 'x') in message
    assert use == '' or use[2:].split('=')[0] in FLAGS
    # In a file its former default means what this version does anyhow; another value does not.
    assert flags.parse([f'--flagfile={cfg(f"--{name}={default}")}']).values == {}
    message = refusal(flags.parse, [f'--flagfile={cfg(f"--seed=1{chr(10)}--{name}=9.5")}'])
    assert f'a.cfg:2: was --{name}; ' in message


@pytest.mark.parametrize(
    ('argv', 'use'),
    [
        ('--user_column=a', '--columns=user:a'),
        ('--text_epochs=9', '--text_options=epochs=9'),
        ('--order=3', '--model_options=max_unit=3'),
        ('--chunk_items=9', '--loss_chunk=-1,9'),
        ('--nopacked', 'nothing replaces it'),
        ('--noffn_shared', '--model_options=ffn_shared'),
    ],
)
def test_what_replaces_a_flag(argv, use):
    assert use in refusal(flags.parse, [argv])


def former(**changes):
    """A flags.cfg of version 0.1: all flags of then, those that are gone with their defaults."""
    values = {name: default for name, (default, _) in REMOVED.items()}
    values |= {'model': 'fame', 'reading': 'warm', 'num_experts': '8', 'dropout': '0.5'} | changes
    return '\n'.join(f'--{name}={value}' for name, value in values.items())


def test_a_former_run_is_read_where_it_means_the_same(cfg):
    kept = {'model': 'fame', 'num_experts': 8, 'dropout': 0.5}
    assert flags.read(cfg(former())) == kept
    assert flags.read(cfg(former(compilation_cache='c', eval_users='7', packed='True'))) == kept
    # gru4rec has no experts: the value never meant anything.
    stored = flags.read(cfg(former(model='gru4rec')))
    config = complete('--model=gru4rec', stored=stored, options=('width', 'dropout'))
    assert config.model.options == {'dropout': 0.5}


def test_a_former_run_is_refused_where_it_means_something_else(cfg):
    for name, value in (('gate_scale', 'one'), ('packed', 'false'), ('synthetic_users', '9')):
        assert f'was --{name};' in refusal(flags.read, cfg(former(**{name: value})))


def test_former_defaults_are_those_of_the_model_and_its_reading(cfg):
    crops = {'crop_share': '0.2', 'mask_share': '0.7', 'reorder_share': '0.2'}
    assert flags.read(cfg(former(model='iclrec', **crops)))['model'] == 'iclrec'
    assert 'was --crop_share' in refusal(flags.read, cfg(former(model='iclrec')))
    paper = {'attention_residual': 'none', 'expert_init': 'random', 'facet_init': 'random'}
    text = former(reading='paper', gate_scale='one', **paper)
    assert flags.read(cfg(text))['reading'] == 'paper'
    assert 'was --attention_residual' in refusal(flags.read, cfg(former(reading='paper')))


# The program.


def test_help_lists_every_flag(capsys):
    assert main.main(['--help', '--sede=1']) == main.main(['-h']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('usage: ')
    for name, item in FLAGS.items():
        line = next(line for line in lines if line.startswith(f'  --{SPELLED.get(name, name)}='))
        assert all(choice in line for choice in item.metadata.get('choices', ()))


def test_no_arguments_print_the_usage_and_the_flag_files(capsys):
    assert main.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith('usage: ') and 'quickstart.cfg' in text
    assert main.main(['--version']) == 0
    assert capsys.readouterr().out == f'fame_jax {fame_jax.__version__}\n'


def test_a_mistake_ends_the_program_with_one_line(capsys):
    assert main.main(['--sede=1']) == main.main(['--distributed=here', '--seed=1']) == 2
    out, errors = capsys.readouterr()
    assert out == '' and errors.count('\n') == errors.count('error: ') == 2


def test_reading_flags_and_help_need_no_jax_and_less_than_a_second():
    program = (
        'import sys, time\n'
        'start = time.process_time()\n'
        'from fame_jax import main\n'
        "main.flags.parse(['--flagfile=toys.cfg', '--seed=1'])\n"
        "main.main(['--help'])\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'numpy', 'polars'}\n"
        'print(*sorted(heavy & set(sys.modules)))\n'
        'print(time.process_time() - start)\n'
    )
    command = [sys.executable, '-c', program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    modules, seconds = done.stdout.split('\n')[-3:-1]
    assert modules == ''
    assert float(seconds) < 1


def test_a_word_of_python_is_a_flag(cfg):
    """--from has the field from_run, and the file of a run has the flag."""
    assert flags.parse(['--from', 'runs/a']).values == {'from_run': 'runs/a'}
    assert flags.parse(['-from=runs/from']).values == {'from_run': 'runs/from'}
    text = flags.text(Config.from_flat(append='new.csv', from_run='runs/a'))
    assert '--from=runs/a\n' in text and '--from_run' not in text
    assert flags.read(cfg(text))['from_run'] == 'runs/a'
