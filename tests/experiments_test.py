"""Every flag file parses, and its models can be built."""

from pathlib import Path

import jax
import pytest

from fame_jax import config as config_lib
from fame_jax.models.build import MODELS, build, initial
from fame_jax.run import label

FOLDER = Path(__file__).parent.parent / 'experiments'
FILES = sorted(FOLDER.glob('*.cfg'))
MODEL_FILES = sorted((FOLDER / 'models').glob('*.cfg'))


def test_there_are_flag_files():
    assert {'quickstart', 'toys', 'toys_paper', 'beauty', 'sports', 'ml-1m'} <= {
        path.stem for path in FILES
    }


def test_every_model_has_a_flag_file():
    assert {path.stem for path in MODEL_FILES} - {'sasrec_bce', 'sasrec_sampled'} == set(MODELS)


@pytest.mark.parametrize('path', [*FILES, *MODEL_FILES], ids=lambda path: path.stem)
def test_a_flag_file_parses_and_its_models_build(path):
    config = config_lib.parse([f'--flagfile={path}'])
    backbone = MODELS[config.model].backbone
    for name in filter(None, (config.model, backbone)):
        module = build(name, config, num_items=100)
        tree = jax.eval_shape(lambda key, module=module: initial(module, key), jax.random.key(0))
        assert tree['item_table'].shape == (101, config.width)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_flag_file_is_a_lab_note_with_its_command(path):
    text = path.read_text()
    assert text.startswith('# ')
    assert f'python -m fame_jax.main --flagfile=experiments/{path.name}' in text
    assert f'--workdir=runs/{path.stem}\n' in text


def test_the_two_toys_recipes_differ_in_what_the_paper_says_otherwise():
    ours, papers = (
        config_lib.parse([f'--flagfile={path}'])
        for path in FILES
        if path.stem in ('toys', 'toys_paper')
    )
    names = {line.split('=')[0] for line in config_lib.differences(ours, papers)}
    assert names == {
        '--reading',
        '--positions',
        '--similarity',
        '--attention_residual',
        '--expert_init',
        '--facet_init',
        '--gate_scale',
    }


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_results_have_a_name_for_it(path):
    config = config_lib.parse([f'--flagfile={path}'])
    names = [label(config, stage) for stage in ('pretrain', 'finetune')]
    assert names[0].startswith('SASRec')
    assert names[1].startswith('FAME+' if path.stem.endswith('_plus') else 'FAME (')
    assert ('as the paper reads' in names[1]) == (path.stem == 'toys_paper')


def test_results_tell_the_files_of_models_apart():
    names = set()
    for path in MODEL_FILES:
        config = config_lib.parse([f'--flagfile={path}'])
        names.add(label(config, 'finetune' if MODELS[config.model].backbone else 'pretrain'))
    assert len(names) == len(MODEL_FILES)
