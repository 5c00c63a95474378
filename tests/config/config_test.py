"""The records: ranges, flags that fit together, what binds a workdir."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fame_jax.config import FLAGS, SECTIONS, SPELLED, Config, binds, differences, section_of
from fame_jax.config.fields import canonical, check_value, merge_pairs
from fame_jax.errors import UserError

BOUNDS = [
    (name, bound)
    for name, field in FLAGS.items()
    for bound in ('low', 'high')
    if bound in field.metadata
]


def error_of(config, **options):
    """The one line with which validate refuses the settings."""
    with pytest.raises(UserError) as error:
        config.validate(**options)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_there_are_at_most_86_flags_and_each_has_one_section():
    assert len(FLAGS) <= 86
    assert sum(len(dataclasses.fields(record)) for record in SECTIONS.values()) == len(FLAGS)


@pytest.mark.parametrize('name', FLAGS)
def test_a_field_describes_its_flag(name):
    about = FLAGS[name].metadata
    assert about['help'].endswith('.')
    assert about['kind'] in (bool, int, float, str, tuple)
    assert FLAGS[name].default is None or type(FLAGS[name].default) is about['kind']
    assert about['kind'] not in (int, float) or 'low' in about


def test_defaults_are_valid():
    Config().validate()


@pytest.mark.parametrize('name', FLAGS)
def test_flat_names_lead_to_the_nested_field_and_back(name, another):
    config = Config.from_flat(**{name: another(name)})
    assert getattr(getattr(config, section_of(name)), name) == another(name)
    assert config.flat() == Config().flat() | {name: another(name)}
    assert Config.from_flat(**config.flat()) == config


def test_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match='sede'):
        Config.from_flat(sede=1)
    with pytest.raises(TypeError, match='sede'):
        Config().replace(seed=1, sede=1)


@pytest.mark.parametrize(('name', 'bound'), BOUNDS)
def test_a_bound_is_inclusive(name, bound):
    about = FLAGS[name].metadata
    limit, kind = about['kind'](about[bound]), about['kind']
    check_value(name, limit, about)
    beyond = limit + (1 if kind is int else 1e-7) * (1 if bound == 'high' else -1)
    message = error_of(Config.from_flat(**{name: beyond}))
    assert f'--{name}=' in message and 'out of range' in message and str(about[bound]) in message


@pytest.mark.parametrize(
    ('name', 'value', 'part'),
    [
        ('seed', True, 'whole number'),
        ('dropout', float('nan'), 'out of range'),
        ('filter_seen', 'no', 'true or false'),
        ('dataset', None, 'a text'),
        ('facets', 'brand', 'tuple'),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, part):
    assert part in error_of(Config.from_flat(**{name: value}))


@pytest.mark.parametrize(
    ('values', 'parts'),
    [
        ({'synthetic': ('users=0',)}, ['--synthetic=users=0', 'at least 1']),
        ({'synthetic': ('items=few',)}, ['--synthetic=items=few', 'whole number']),
        ({'synthetic': ('user=9',)}, ["'user'", 'did you mean users?']),
        ({'synthetic': ('users=9', 'users=8')}, ["'users' is given twice"]),
        ({'synthetic': ('users',)}, ['NAME=VALUE']),
        ({'dataset': 'toys', 'synthetic': ('users=9',)}, ['no effect', '--dataset=toys']),
        ({'columns': ('user:a',)}, ['--columns=user:a', 'no effect']),
        ({'dataset': 'a.csv', 'columns': ('usr:a',)}, ['did you mean user?']),
        ({'facets': ('brand',)}, ['--facets', '--item_init=text']),
        ({'append': 'new.csv'}, ['--append=new.csv', 'together with --from=RUN']),
        ({'from_run': 'runs/a'}, ['--from=runs/a', 'together with --append=FILE']),
        ({'replay': 0.5}, ['--replay=0.5', 'no effect', '--append=FILE']),
        ({'stages': ('update',)}, ['--stages=update', '--append=FILE --from=RUN']),
        (
            {'append': 'new.csv', 'from_run': 'a', 'stages': ('prepare',)},
            ['--stages=prepare', 'update and evaluate'],
        ),
        ({'text_options': ('epochs=3',)}, ['--text_options', 'no effect']),
        ({'item_init': 'text', 'text_options': ('epoch=3',)}, ['did you mean epochs?']),
        ({'stages': ('prepare', 'text')}, ['--stages=text', '--item_init=text']),
        ({'unseen_items': 'kept'}, ['--unseen_items=kept', '--item_init=text']),
        (
            {'item_scale': 0.3},
            ['--item_scale=0.3 has no effect where --item_init=random; add --item_init=text'],
        ),
        ({'item_scale': 0.3, 'text_path': 0.5}, ['--item_scale=0.3', 'no effect']),
        (
            {'item_init': 'text', 'facets': ('instance',), 'text_options': ('dropout=0.0',)},
            ['dropout=0', 'two views'],
        ),
        ({'model_options': ('width=8',)}, ['use --width=8']),
        ({'model_options': ('max_length=8',)}, ['use --max_length=8']),
        ({'future_targets': ()}, ['--future_targets=:', 'such as 1,.3,.1']),
        ({'future_targets': ('0', '1')}, ['--future_targets=0,1', 'the first larger than 0']),
        ({'finetune_future_targets': ('1', '-1')}, ['--finetune_future_targets=1,-1']),
        ({'future_targets': ('1', 'nan')}, ['--future_targets=1,nan', 'none negative']),
        ({'future_targets': ('1',) * 17}, ['up to 16 shares']),
        ({'loss': 'bce', 'seen_weight': 3.0}, ['--seen_weight=3.0', 'no effect']),
        ({'loss_chunk': ('1',)}, ['--loss_chunk=1', 'TOKENS,ITEMS']),
        ({'loss_chunk': ('-2', '0')}, ['--loss_chunk=-2,0']),
        ({'loss': 'bce', 'loss_chunk': ('8', '0')}, ['--loss_chunk=8,0', 'no effect']),
        ({'num_negatives': 9}, ['--num_negatives=9', '--loss=bce']),
        ({'loss': 'sampled', 'num_negatives': 9}, ['--num_negatives=9', '256']),
        ({'negatives': 'popularity'}, ['--negatives=popularity', '--loss=sampled']),
        ({'backbone': 'scratch', 'stages': ('pretrain',)}, ['--backbone=scratch', 'pretrain']),
        ({'data_parallel': 3}, ['--rows_per_step=8', '--data_parallel=3', 'multiple']),
        ({'distributed': 'host:1,2/2'}, ['--distributed=host:1,2/2', 'RANK from 0 to N-1']),
        ({'distributed': 'host:1'}, ['HOST:PORT,RANK/N']),
        ({'distributed': 'host:1,0/2', 'stages': ('report',)}, ['report', 'one process']),
        ({'max_length': 65}, ['--row_length=64', '--max_length=65', 'at least 65']),
        ({'dataset': 'a\nb'}, ['flag file']),
        ({'dataset': ' a'}, ['flag file']),
        ({'text_fields': ('a', 'b\x85')}, ['flag file']),
    ],
)
def test_settings_that_do_not_fit_are_one_line(values, parts):
    message = error_of(Config.from_flat(**values))
    for part in parts:
        assert part in message


def test_the_length_of_rows_depends_on_how_the_model_makes_them():
    fits = Config.from_flat(max_length=64)
    fits.validate('next')
    assert 'at least 65' in error_of(fits, row_layout='masked')
    Config.from_flat(max_length=500).validate('prefixes')


def test_what_other_folders_read():
    config = Config.from_flat(
        dataset='a.csv',
        columns=('user:a:token', 'time:t'),
        text_options=('dropout=.20',),
        loss_chunk=('512', '1024'),
        distributed='10.0.0.1:84,1/4',
        width=32,
        model_options=('crop_share=.3',),
    )
    assert config.data.column_names == {'user': 'a:token', 'time': 't'}
    assert Config.from_flat(synthetic=('items=30',)).data.synthetic_options == {
        **{'users': 4000, 'items': 30, 'facets': 2, 'values': 8, 'seed': 0}
    }
    assert config.text.options['dropout'] == '0.2' and config.text.options['epochs'] == '50'
    assert (config.loss.chunk_tokens, config.loss.chunk_items) == (512, 1024)
    labels = Config.from_flat(future_targets=('2', '.5', '0')).loss
    assert labels.shares('pretrain') == labels.shares('finetune') == (2, 0.5)
    labels = Config.from_flat(future_targets=('1', '.5'), finetune_future_targets=('3',)).loss
    assert (labels.shares('pretrain'), labels.shares('finetune')) == ((1, 0.5), (1,))
    assert config.devices.processes == ('10.0.0.1:84', 1, 4)
    assert Config().devices.processes == ('', 0, 1)
    assert config.model.options == {'width': 32, 'crop_share': '.3'}


def test_options_of_a_model_written_out():
    options = {'width': 64, 'max_length': 50, 'crop_share': 0.25, 'remat': False, 'kind': 'one'}
    config = Config.from_flat(num_heads=2).with_model_options(options)
    assert (config.model.width, config.model.num_heads) == (64, None)
    assert config.model.model_options == ('crop_share=0.25', 'remat=false', 'kind=one')


@given(st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.booleans())
def test_equal_values_have_one_spelling(value):
    spelled = canonical(value)
    assert canonical(spelled) == spelled == canonical(str(value))
    back = {'true': True, 'false': False}.get(spelled) if type(value) is bool else float(spelled)
    assert back == (value if type(value) is bool else float(value))


def test_pairs_of_later_layers_win_by_name():
    assert merge_pairs('=', ('a=1', 'b=2'), (), ('b=.50', 'c=X')) == ('a=1', 'b=0.5', 'c=X')
    assert merge_pairs(':', ('a:1.0',), ('a:2.0',)) == ('a:2.0',)


# A workdir holds one run.

EVERY = (*SECTIONS, 'finetune')


@pytest.mark.parametrize('name', FLAGS)
def test_differences_are_those_of_the_sections_that_the_run_has_used(name, another):
    base = {'item_init': 'text'} if name == 'items' else {}
    here, there = Config.from_flat(**base, **{name: another(name)}), Config.from_flat(**base)
    bound = binds(name)
    assert differences(here, there, [s for s in EVERY if s != bound]) == []
    lines = differences(here, there, EVERY)
    assert bool(lines) == bool(bound)
    name = SPELLED.get(name, name)
    assert all(line.startswith(f'--{name}=') and '(there: ' in line for line in lines)
    assert differences(here, here, EVERY) == []


def test_after_prepare_only_the_data_are_bound():
    changed = [name for name in FLAGS if binds(name) == 'data']
    assert sorted(changed) == sorted(
        [
            *('dataset', 'prepared', 'columns', 'min_rating', 'k_core', 'max_user_actions'),
            *('duplicates', 'synthetic'),
        ]
    )
    assert {name for name in FLAGS if not binds(name)} >= {
        *('workdir', 'data_dir', 'progress', 'steps_per_dispatch', 'checkpoint_seconds'),
        *('cache_dir', 'profile', 'stages', 'top_k', 'out', 'data_parallel', 'distributed'),
    }


def test_differences_of_pairs_name_the_pair():
    here, there = (Config.from_flat(synthetic=(f'users={n}', 'seed=0')) for n in (9, 8))
    assert differences(here, there, ('data',)) == ['--synthetic=users=9 (there: 8)']


def test_the_id_of_the_item_file_does_not_bind_how_the_log_was_read():
    """It binds with the stage text, whichever other sections are used."""
    plus = {'item_init': 'text', 'dataset': 'a.csv'}
    one, other = (
        Config.from_flat(**plus, columns=('item:sku', f'item_file_id:{n}')) for n in ('asin', 'id')
    )
    assert differences(one, other, [name for name in EVERY if name != 'text']) == []
    assert differences(one, other, ('text',)) == ['--columns=item_file_id:asin (there: id)']
    log = one.replace(columns=('item:code', 'item_file_id:asin'))
    assert differences(one, log, ('text',)) == []
    assert differences(one, log, ('data',)) == ['--columns=item:sku (there: code)']


def test_titles_for_a_trained_run_are_no_difference():
    """--items gives titles when a run is used, and only FAME+ trains on its texts."""
    titles = {'items': 'titles.csv', 'columns': ('item_file_id:asin',)}
    assert differences(Config.from_flat(**titles), Config(), EVERY) == []
    plus = Config.from_flat(item_init='text')
    assert len(differences(plus.replace(**titles), plus, EVERY)) == 2
