"""Every flag there and back, which value wins, and one clear line for every mistake."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax import config as config_lib
from fame_jax import main as door
from fame_jax.config import Config
from fame_jax.errors import UserError

FIELDS = config_lib.fields()
RUNTIME = [name for name, field in FIELDS.items() if field.metadata.get('runtime')]


def another(name):
    """A value of the field that may be given and is not its default."""
    field = FIELDS[name]
    default, about = field.default, field.metadata
    if isinstance(default, bool):
        return not default
    if isinstance(default, tuple):
        return default[:1] or ('a b=c', 'é')
    if about.get('choices'):
        return next(choice for choice in about['choices'] if choice != default)
    if isinstance(default, str):
        return 'a b=c,é'
    if isinstance(default, int):
        return default + 1
    return default / 2 or 0.1


def as_flag(name, value):
    value = str(value).lower() if isinstance(value, bool) else value
    return f'--{name}={",".join(value) if isinstance(value, tuple) else value}'


def refusal(*argv):
    """The one line that parse refuses these arguments with."""
    with pytest.raises(UserError) as error:
        config_lib.parse(argv)
    message = str(error.value)
    assert message and '\n' not in message
    return message


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / 'run'


def stored_run(workdir, text):
    """A workdir that holds a run of these flags."""
    workdir.mkdir()
    (workdir / 'flags.cfg').write_text(text)
    return f'--workdir={workdir}'


def test_every_field_is_sound():
    for name, field in FIELDS.items():
        about = field.metadata
        assert type(field.default) in (bool, int, float, str, tuple), name
        assert about['help'].endswith('.'), name
        assert set(about) <= {'help', 'choices', 'low', 'high', 'runtime', 'section'}, name
    config_lib.check(Config())


def test_defaults_may_be_run():
    config = config_lib.parse([])
    assert config == Config(workdir=config.workdir)
    assert config.workdir == 'runs/synthetic_fame'
    assert config_lib.parse(['--dataset=/some/where/log.tsv.gz', '--num_experts=1']).workdir == (
        'runs/log_fame'
    )


# There and back.


@pytest.mark.parametrize('name', FIELDS)
def test_a_field_there_and_back(name, tmp_path):
    config = dataclasses.replace(Config(), **{name: another(name)})
    assert getattr(config, name) != getattr(Config(), name)
    path = tmp_path / 'flags.cfg'
    path.write_text(config_lib.text(config), encoding='utf-8')
    assert config_lib.read(path) == config
    # And through the command line, one flag of it, before check has its say.
    given = config_lib._given([as_flag(name, another(name))], 'here')
    assert given == {name: another(name)}
    assert type(given[name]) is type(FIELDS[name].default)


def test_a_flag_file_repeats_a_run(tmp_path):
    config = config_lib.parse(
        ['--reading=paper', '--seed=7', '--dropout=0.3', '--nopacked', '--workdir=somewhere']
    )
    path = tmp_path / 'flags.cfg'
    path.write_text(config_lib.text(config))
    assert config_lib.parse([f'--flagfile={path}']) == config
    assert config_lib.text(config_lib.read(path)) == config_lib.text(config)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0, 10), st.integers(0, 2**31), st.text(st.characters(categories=['L', 'N', 'P', 'S']))
)
def test_any_value_there_and_back(rate, seed, dataset):
    config = Config(learning_rate=rate, seed=seed, dataset=dataset)
    lines = config_lib.text(config).split('\n')
    given = config_lib._given([line for line in lines if line.startswith('--')], 'here')
    assert Config(**given) == config


@pytest.mark.parametrize('name', ['a\x0cb', 'a\x85b', 'a\u2028b', 'a\rb', 'a\nb', 'a\udcffb'])
def test_an_odd_file_name_comes_back_or_is_refused(name, tmp_path):
    """Whatever parse lets through, the flags.cfg of the run must hold."""
    path = tmp_path / 'flags.cfg'
    try:
        config = config_lib.parse([f'--dataset={name}', '--workdir=w'])
    except UserError as error:
        assert '\n' not in str(error)
        return
    path.write_bytes(config_lib.text(config).encode())
    assert config_lib.read(path) == config


def test_text_has_one_flag_a_line_and_headings():
    lines = config_lib.text(Config()).splitlines()
    flags = [line for line in lines if line.startswith('--')]
    assert [line[2:].split('=')[0] for line in flags] == list(FIELDS)
    sections = [f.metadata['section'] for f in FIELDS.values() if 'section' in f.metadata]
    assert [line for line in lines if line.startswith('#')] == [f'# {s}' for s in sections]
    assert lines[0] == '# The run'
    assert '--stages=prepare,pretrain,finetune,evaluate' in lines
    assert '--packed=true' in lines
    assert '--learning_rate=0.001' in lines


# Which value wins: command line, stored run, --reading, default.


def test_a_stored_run_gives_what_it_is_and_not_how_it_was_run(workdir):
    place = stored_run(workdir, '--seed=3\n--eval_users=7\n')
    config = config_lib.parse([place])
    assert (config.seed, config.eval_users) == (3, 1024)
    config = config_lib.parse([place, '--eval_users=9'])
    assert (config.seed, config.eval_users) == (3, 9)


def test_the_stored_run_wins_over_the_reading(workdir):
    place = stored_run(workdir, '--reading=paper\n--gate_scale=heads\n')
    config = config_lib.parse([place])
    assert config.gate_scale == 'heads'  # stored
    assert config.expert_init == 'random'  # of the reading
    assert config.num_experts == 8  # default


def test_the_reading_wins_over_the_defaults_alone():
    config = config_lib.parse(['--reading=paper', '--facet_init=slices'])
    expected = config_lib.PAPER_READING | {'facet_init': 'slices'}
    assert {name: getattr(config, name) for name in expected} == expected
    warm = config_lib.parse(['--reading=warm'])
    assert warm == config_lib.parse([])


def test_the_paper_reading_sets_flags_that_there_are():
    for name, value in config_lib.PAPER_READING.items():
        assert value in FIELDS[name].metadata['choices']


def test_later_flags_win(tmp_path):
    path = tmp_path / 'a.cfg'
    path.write_text('--seed=4\n')
    assert config_lib.parse(['--seed=1', '--seed=2']).seed == 2
    assert config_lib.parse([f'--flagfile={path}', '--seed=5']).seed == 5
    assert config_lib.parse(['--seed=5', f'--flagfile={path}']).seed == 4


@pytest.mark.parametrize('given', ['--seed=3', '--seed 3', '-seed=3'])
def test_ways_to_write_a_flag(given):
    assert config_lib.parse(given.split()).seed == 3


@pytest.mark.parametrize('given', ['--nopacked', '--packed=false', '--packed=0', '--packed=f'])
def test_ways_to_say_no(given):
    assert config_lib.parse([given]).packed is False


# The same workdir is the same run.


@pytest.mark.parametrize('name', [name for name in FIELDS if name not in RUNTIME])
def test_a_workdir_refuses_another_run(name, workdir):
    place = stored_run(workdir, config_lib.text(Config()))
    other = another(name)
    message = refusal(place, as_flag(name, other))
    there = as_flag(name, FIELDS[name].default).split('=', 1)[1]
    assert str(workdir) in message
    assert as_flag(name, other) in message and f'there: {there}' in message
    # What is the same may be said again.
    assert config_lib.parse([place, as_flag(name, FIELDS[name].default)]).seed == 0


# Flags that mean nothing alone.
TOGETHER = ('coordinator', 'num_processes', 'process')


@pytest.mark.parametrize('name', [n for n in RUNTIME if n not in ('workdir', *TOGETHER)])
def test_a_workdir_takes_other_runtime_flags(name, workdir):
    place = stored_run(workdir, config_lib.text(Config()))
    config = config_lib.parse([place, as_flag(name, another(name))])
    assert getattr(config, name) == another(name)


def test_a_run_that_was_moved_is_the_same_run(workdir):
    place = stored_run(workdir, config_lib.text(Config(workdir='elsewhere', seed=3)))
    config = config_lib.parse([place])
    assert (config.workdir, config.seed) == (str(workdir), 3)


def test_the_workdir_that_is_found_by_default_is_asked_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs').mkdir()
    stored_run(tmp_path / 'runs' / 'synthetic_fame', '--seed=3\n')
    assert config_lib.parse([]).seed == 3
    assert '--seed=4' in refusal('--seed=4')


def test_differences_name_both_values():
    here, there = Config(seed=1, packed=False, workdir='a'), Config(workdir='b')
    assert config_lib.differences(here, there) == [
        '--seed=1 (there: 0)',
        '--packed=false (there: true)',
    ]
    assert config_lib.differences(here, here) == []


# Mistakes.


@pytest.mark.parametrize(
    ('given', 'parts'),
    [
        ('--sede=1', ['no flag --sede', 'did you mean --seed?']),
        ('--nodatasets', ['no flag --nodatasets', 'did you mean --dataset?']),
        ('--zzz=1', ['no flag --zzz', '--help lists them']),
        ('seed=1', ['"seed=1" is not a flag']),
        ('--seed', ['Missing value', '--seed']),
        ('--seed=one', ['--seed=one']),
        ('--seed=1.5', ['--seed=1.5']),
        ('--dropout=much', ['--dropout=much']),
        ('--dropout=nan', ['--dropout=nan', 'out of range']),
        ('--packed=maybe', ['--packed=maybe']),
        ('--stages=', ['names no stage', 'pretrain']),
        ('--stages=prepare,evalute', ['--stages=evalute', 'did you mean evaluate?']),
        ('--stages="prepare', ['--stages']),
        ('--model=bert', ['--model=bert', 'did you mean bert4rec']),
        ('--entmax_alpha=1.2', ['--entmax_alpha=1.2', '1.5']),
        ('--num_heads=3', ['--width=64', '--num_heads=3']),
        ('--max_length=65', ['--row_length=64', '--max_length=65']),
        ('--finetune_from=scratch', ['--finetune_from=scratch', '--stages']),
        ('--expert_noise=0', ['--expert_noise=0', '0.02']),
        ('--flagfile', ['--flagfile']),
    ],
)
def test_a_mistake_is_one_line(given, parts):
    message = refusal(given)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    'given, parts',
    [
        (['--model=sasrec', '--stages=finetune'], ['nothing to fine-tune', 'pretrain,evaluate']),
        (['--model=miasrec', '--loss=bce'], ['--loss=bce', '--model=miasrec', 'leave it out']),
        (['--model=bert4rec', '--positions=both'], ['--positions=both', '--positions=start']),
        (['--model=bert4rec', '--max_length=64'], ['--row_length=64', 'the one to guess']),
        (['--negatives=popularity'], ['--negatives=popularity', '--loss=ce', '--loss=sampled']),
        (['--data_parallel=3'], ['--rows_per_step=8', '--data_parallel=3', 'multiple']),
        (['--model=bert4rec', '--model_parallel=2'], ['--model_parallel=2', 'sasrec']),
        (['--num_processes=2'], ['--coordinator=(none)', 'both']),
        (['--coordinator=here:1'], ['--num_processes=1', 'both']),
        (['--coordinator=here:1', '--num_processes=2', '--process=2'], ['--process=2', 'from 0']),
        (
            ['--coordinator=here:1', '--num_processes=2', '--stages=evaluate,report'],
            ['report', 'one process'],
        ),
    ],
)
def test_what_cannot_be_is_one_line(given, parts):
    message = refusal(*given)
    for part in parts:
        assert part in message


def test_a_model_brings_its_recipe_and_a_flag_is_stronger():
    assert config_lib.parse(['--model=gru4rec']).dropout == 0.3
    assert config_lib.parse(['--model=gru4rec']).stages == ('prepare', 'pretrain', 'evaluate')
    assert config_lib.parse(['--model=gru4rec', '--dropout=0.1']).dropout == 0.1
    assert config_lib.parse([]).dropout == 0.5


@pytest.mark.parametrize('name', [n for n, f in FIELDS.items() if f.metadata.get('choices')])
def test_a_value_that_is_no_choice(name):
    choices = FIELDS[name].metadata['choices']
    wrong = choices[-1] + 'x'
    message = refusal(f'--{name}={wrong}')
    assert f'--{name}={wrong}' in message and f'did you mean {choices[-1]}?' in message
    message = refusal(f'--{name}=0123456789')
    assert all(choice in message for choice in choices)


BOUNDS = [
    (name, bound)
    for name, field in FIELDS.items()
    for bound in ('low', 'high')
    if bound in field.metadata
]


@pytest.mark.parametrize(('name', 'bound'), BOUNDS)
def test_a_value_out_of_range(name, bound):
    limit = FIELDS[name].metadata[bound]
    step = 1 if isinstance(FIELDS[name].default, int) else 1e-7
    beyond = limit - step if bound == 'low' else limit + step
    message = refusal(f'--{name}={beyond}')
    assert f'--{name}=' in message and 'out of range' in message and str(limit) in message
    with pytest.raises(UserError, match='out of range'):
        config_lib.check(dataclasses.replace(Config(), **{name: beyond}))
    config_lib._check_value(name, limit, FIELDS[name].metadata)  # the bound itself will do


def test_every_number_has_a_range():
    for name, field in FIELDS.items():
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert 'low' in field.metadata, name


@pytest.mark.parametrize('seed', [2**32, 2**64])
def test_a_seed_that_jax_cannot_hold_is_refused(seed):
    """It keeps 32 bits: 2^32 would be 0 again, and 2^64 an OverflowError."""
    assert 'out of range' in refusal(f'--seed={seed}')


# Flag files.


def test_a_flag_file_with_comments_and_blank_lines(tmp_path):
    path = tmp_path / 'a.cfg'
    path.write_bytes(b'# a lab note\r\n\r\n--seed=4\r\n// also one\n  --width=32\n--nopacked\n')
    config = config_lib.parse([f'--flagfile={path}'])
    assert (config.seed, config.width, config.packed) == (4, 32, False)


def test_a_flag_file_may_name_another(tmp_path):
    base, path = tmp_path / 'base.cfg', tmp_path / 'a.cfg'
    base.write_text('--seed=4\n--width=32\n')
    path.write_text(f'--flagfile={base}\n--seed=5\n')
    config = config_lib.parse([f'--flagfile={path}'])
    assert (config.seed, config.width) == (5, 32)


def test_a_flag_file_that_cannot_be_read(tmp_path):
    missing, binary = tmp_path / 'missing.cfg', tmp_path / 'binary.cfg'
    binary.write_bytes(bytes(range(256)))
    assert str(missing) in refusal(f'--flagfile={missing}')
    assert str(tmp_path) in refusal(f'--flagfile={tmp_path}')
    assert 'not text' in refusal(f'--flagfile={binary}')


def test_a_flag_file_with_a_mistake(tmp_path):
    path = tmp_path / 'a.cfg'
    path.write_text('--seed=4\n--widht=32\n')
    assert 'did you mean --width?' in refusal(f'--flagfile={path}')
    path.write_text('--seed=4\nhello\n')
    assert '"hello" is not a flag' in refusal(f'--flagfile={path}')


def test_a_stored_run_that_cannot_be_read(workdir):
    place = stored_run(workdir, '--sede=1\n')
    message = refusal(place)
    assert str(workdir / 'flags.cfg') in message and 'did you mean --seed?' in message
    (workdir / 'flags.cfg').write_bytes(b'\xff\xfe\x00')
    assert 'not text' in refusal(place)
    (workdir / 'flags.cfg').write_text('--temperature=0\n')
    assert '--temperature=0.0 is out of range' in refusal(place)
    for path in (workdir / 'none.cfg', workdir):
        with pytest.raises(UserError) as error:
            config_lib.read(path)
        assert str(path) in str(error.value) and '\n' not in str(error.value)


# The door.


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull'])
def test_help_lists_every_flag(flag, capsys):
    assert door.main([flag, '--sede=1']) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for name, field in FIELDS.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f'  --{name}=')]
        assert lines[at + 1].strip() == field.metadata['help']
        assert all(choice in lines[at] for choice in field.metadata.get('choices', ()))


def test_the_door_tells_a_mistake_in_one_line():
    command = [sys.executable, '-m', 'fame_jax.main', '--sede=1']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


def test_reading_flags_needs_no_jax():
    program = (
        'import sys, time\n'
        'began = time.perf_counter()\n'
        'import fame_jax.config, fame_jax.main\n'
        "fame_jax.config.parse(['--seed=1'])\n"
        'print(time.perf_counter() - began)\n'
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'numpy', 'polars'}\n"
        'print(*sorted(heavy & set(sys.modules)))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, timeout=60, check=True
    )
    seconds, modules = done.stdout.split('\n')[:2]
    assert modules == ''
    assert float(seconds) < 2


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--facets=brand'], '--item_init=random makes no use of --facets'),
        (['--stages=prepare,text'], 'makes no use of the stage text'),
        (['--text_epochs=3', '--item_init=x.npy'], '--item_init=x.npy makes no use of --text_epo'),
        (['--unseen_items=kept'], 'holds rows that start at random'),
        (['--item_training=added'], 'holds rows that start at random'),
        (['--item_init=text', '--unseen_items=kept', '--item_training=frozen'], 'does nothing'),
        (['--item_init=text', '--text_design=shared', '--facet_init=random'], 'does nothing'),
        (['--item_init=text', '--text_orthogonality=1'], 'is of --text_design=shared'),
        (['--item_init=text', '--facets=brand', '--text_dropout=0'], 'two views'),
    ],
)
def test_flags_of_texts_that_would_do_nothing_are_refused(flags, message):
    assert message in refusal(*flags)


def test_what_makes_use_of_a_run_is_a_section_and_no_part_of_any_run():
    names = list(config_lib.fields())
    first, last = names.index(config_lib.USING[0]), names.index(config_lib.USING[-1])
    assert tuple(names[first : last + 1]) == config_lib.USING
    assert all(config_lib.is_runtime(name) for name in config_lib.USING)
