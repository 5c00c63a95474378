"""The model of docs/adding-a-model.md passes the checks of every model, and trains as it says."""

import json
import re
import sys

import model_checks
import numpy as np
import pytest
from fixtures import ROOT, new_key

from fame_jax.main import main
from fame_jax.models import registry

PAGE = ROOT / 'docs' / 'adding-a-model.md'
NAME = 'my_models:MeanPool'


@pytest.fixture(scope='module', autouse=True)
def my_models(tmp_path_factory):
    """The page's code as a module in the current folder."""
    code, *_ = re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    folder = tmp_path_factory.mktemp('my_models')
    (folder / 'my_models.py').write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'path', [str(folder), *sys.path])
        yield
        sys.modules.pop('my_models', None)


@pytest.fixture(scope='module')
def small():
    module = registry.make(NAME, {'window': '3', 'width': '16'}, num_items=model_checks.V)
    return module, model_checks.initialiser(module)(new_key(0))


def test_its_options_and_facts(small):
    module, _ = small
    assert registry.label(module) == 'MeanPool (width 16, window 3)'
    model_checks.check_facts(type(module))
    model_checks.check_shapes(module)


def test_it_is_causal_and_independent_of_other_rows(small):
    model_checks.check_causal(*small)
    model_checks.check_company(*small)
    model_checks.check_items_in_parts(*small)


def test_a_query_is_made_of_the_last_items(small):
    module, params = small
    fields = model_checks.right_aligned([[5, 1, 2, 3]], 4)
    query_B1D, _ = module.apply({'params': params}, *fields, last=True)
    mean_D = np.mean([params['item_table'][item] for item in (1, 2, 3)], axis=0)
    dense = params['dense']
    np.testing.assert_allclose(query_B1D[0, 0], mean_D @ dense['kernel'] + dense['bias'], atol=1e-6)


def test_it_learns(small):
    module, _ = small
    model_checks.check_learning(module.clone(dropout=0.0))


def test_the_command_line_trains_and_evaluates_it(tmp_path):
    argv = [
        *('--dataset=synthetic', '--synthetic=users=60,items=40', f'--model={NAME}'),
        *('--dropout=0.1', '--model_options=window=5', '--width=16', '--pretrain_epochs=1'),
        *('--progress=none', f'--workdir={tmp_path / "run"}'),
    ]
    assert main(argv) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())['results']['pretrain']
    assert results['model'] == 'MeanPool (width 16, window 5, dropout 0.1)'
    metrics = results['test']['masked']
    assert 0 < metrics['ndcg@10'] < metrics['hr@10'] < metrics['hr@20'] < 1


def test_branches_of_it_are_made_as_the_page_says():
    code = re.search(
        r'^```python no-test\n(from fame_jax.models.branches.*?)^```',
        PAGE.read_text(),
        re.DOTALL | re.MULTILINE,
    ).group(1)
    names = {'MeanPool': registry.find(NAME), '__name__': 'my_models'}
    exec(code, names)
    module = names['BranchedMeanPool'](num_items=model_checks.V, width=16, branches=2)
    module.validate()
    assert module.similarity == 'dot' and module.branch_module().width == 8
    params = model_checks.initialiser(module)(new_key(0))
    assert params['branches']['dense']['kernel'].shape == (2, 8, 8)
    model_checks.check_causal(module, params)
