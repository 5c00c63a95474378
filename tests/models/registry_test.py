"""Names, options and labels of models."""

import sys
from typing import Literal

import jax.numpy as jnp
import pytest

from fame_jax.errors import UserError
from fame_jax.models import options as option_types
from fame_jax.models import registry
from fame_jax.models.fame import FAME
from fame_jax.models.item_model import ItemModel
from fame_jax.models.sasrec import SASRec


def refused(name, options, **more):
    """The one line with which a model is refused."""
    with pytest.raises(UserError) as error:
        registry.make(name, options, **more)
    assert '\n' not in str(error.value)
    return str(error.value)


# Names.


def test_a_name_close_to_a_model_is_corrected():
    assert registry.find('sasrec') is SASRec
    with pytest.raises(UserError, match=r'--model=sasrek: .* did you mean sasrec\?'):
        registry.find('sasrek')


OUTSIDE = """
from fame_jax.models.sasrec import SASRec
{line}
class Mine(SASRec):
    title = 'Mine'
"""


def write_module(folder, monkeypatch, name, line=''):
    """A Python module with a model in the current folder, which is on no search path."""
    (folder / f'{name}.py').write_text(OUTSIDE.format(line=line))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])


def test_a_class_outside_of_the_package_is_found_by_its_module(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, 'some_models')
    module = registry.make('some_models:Mine', {'num_heads': '4'}, num_items=3)
    assert (type(module).__name__, module.num_heads, module.num_items) == ('Mine', 4, 3)
    assert registry.label(module) == 'Mine (num_heads 4)'


@pytest.mark.parametrize(
    'name, words',
    [
        ('nowhere:Model', 'no Python module nowhere'),
        ('nowhere.at_all:Model', 'no Python module nowhere.at_all'),
        ('json:JSONDecoder', "json has no ItemModel class 'JSONDecoder'"),
        ('fame_jax.models.fame:', 'has no ItemModel class'),
        (':Model', 'not of the form package.module:Class'),
    ],
)
def test_a_class_that_is_not_there_is_refused(name, words):
    assert words in refused(name, {})


def test_a_fault_inside_an_outside_module_keeps_its_traceback(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, 'faulty_models', line='import missing_library')
    with pytest.raises(ModuleNotFoundError, match='missing_library'):
        registry.find('faulty_models:Mine')


# Options.


def test_a_model_without_options_has_its_defaults():
    module = registry.make('fame', {}, num_items=7)
    assert module == FAME(num_items=7)
    assert {name: getattr(module, name) for name in registry.options(FAME)} == registry.options(
        FAME
    )
    assert not {'num_items', 'dtype', 'mesh', 'parent', 'name'} & registry.options(FAME).keys()


def test_options_are_read_from_text():
    text = {'num_heads': '4', 'dropout': '0', 'remat': 'true', 'routing': 'inputs', 'width': None}
    module = registry.make('fame', text, dtype='bfloat16')
    assert module == FAME(
        num_heads=4, dropout=0.0, remat=True, routing='inputs', dtype=jnp.dtype('bfloat16')
    )
    assert isinstance(module.dropout, float)
    assert registry.make('fame', {'remat': 'False', 'num_experts': 2}).num_experts == 2


def test_a_reading_sets_options_which_given_ones_override():
    module = registry.make('fame', {'gate_scale': 'heads'}, reading='paper')
    assert (module.attention_residual, module.gate_scale) == ('none', 'heads')
    assert '--reading=paper: SASRec has no such reading' in refused('sasrec', {}, reading='paper')


@pytest.mark.parametrize(
    'name, options, words',
    [
        ('gru4rec', {'num_heads': '7'}, '--num_heads=7: GRU4Rec has no option num_heads; its opt'),
        ('fame', {'num_head': 7}, 'did you mean num_heads?'),
        ('fame', {'num_heads': 'two'}, '--num_heads=two has to be a whole number'),
        ('fame', {'num_heads': 2.0}, '--num_heads=2.0 has to be of type int'),
        ('fame', {'num_heads': True}, '--num_heads=True has to be of type int'),
        ('fame', {'dropout': 'half'}, '--dropout=half has to be a number'),
        ('fame', {'remat': 'perhaps'}, '--remat=perhaps has to be true or false'),
        ('fame', {'routing': 'output'}, '--routing=output: did you mean outputs?'),
        ('bert4rec', {'positions': 'relative'}, '--positions=relative: choose from start'),
        ('bsarec', {'positions': 'start'}, '--positions=start: choose from end, relative'),
        ('causal_bsarec', {'positions': 'end'}, '--positions=end: choose from relative, start'),
        ('bsarec', {'num_heads': 5}, 'does not divide into num_heads=5 heads'),
        ('fame', {'dropout': 1.0}, '--dropout=1.0 is out of range; it must be from 0 to 0.99'),
        ('fame', {'temperature': 'nan'}, '--temperature=nan is out of range'),
        ('sasrec', {'width': '7'}, '--width=7 does not divide into num_heads=2 heads'),
        ('atten_mixer', {'num_heads': 5}, 'does not divide into num_heads=5 heads'),
        ('miasrec', {'num_heads': 5}, 'does not divide into num_heads=5 heads'),
        ('miasrec', {'entmax_alpha': 1.2}, '--entmax_alpha=1.2 has to be 1 (softmax), 1.5 or 2'),
        ('fame', {'active_experts': 9}, '--active_experts=9 is more than num_experts=8'),
        ('fame', {'balance_weight': 0.1, 'num_experts': 1}, '--balance_weight=0.1 has no effect'),
        ('fame', {'expert_noise': 0}, '--expert_noise=0 starts all experts'),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, words):
    assert words in refused(name, options)


@pytest.mark.parametrize(
    'options',
    [
        {'active_experts': 2, 'balance_weight': 0.01},
        {'expert_noise': 0, 'num_experts': 1},
        {'expert_noise': 0, 'expert_init': 'random'},
    ],
)
def test_options_that_can_be_are_not(options):
    registry.make('fame', options)


def test_annotations_that_cannot_be_options_are_faults():
    class Lists(ItemModel):
        sizes: list = ()

    class Needs(ItemModel):
        depth: int = 0
        kind: Literal['a', 'b'] = 'a'

    with pytest.raises(TypeError, match=r'Lists\.sizes is annotated'):
        registry.options(Lists)
    assert option_types.parse(Needs, 'kind', 'b') == 'b'


# Labels.


@pytest.mark.parametrize(
    'name, options, label',
    [
        ('sasrec', {}, 'SASRec'),
        ('gru4rec', {'dropout': 0.5}, 'GRU4Rec (dropout 0.5)'),
        ('fame', {}, 'FAME (H 2, N 8)'),
        ('fame', {'num_heads': 4, 'num_experts': 1}, 'FAME (H 4, N 1)'),
        ('fame', {'gate_scale': 'one'}, 'FAME (H 2, N 8, gate_scale one)'),
        ('fame', {'ffn_shared': False, 'remat': True}, 'FAME (H 2, N 8, ffn_shared false)'),
        ('msgifsr', {'partition_chunk': 512, 'max_unit': 2}, 'MSGIFSR (max_unit 2)'),
        ('causal_bsarec', {'cutoff': 7}, 'BSARec, causal (cutoff 7)'),
        ('tvrec', {'num_filters': 16}, 'TV-Rec (num_filters 16)'),
    ],
)
def test_a_label_names_what_differs_from_the_defaults(name, options, label):
    assert registry.label(registry.make(name, options, num_items=5)) == label


def test_a_label_names_the_reading_and_the_dtype():
    module = registry.make('fame', {'positions': 'start'}, reading='paper', dtype='bfloat16')
    assert registry.label(module) == 'FAME (H 2, N 8, paper reading, positions start, bfloat16)'
