"""The control of FAME is its backbone, before the first step of fine-tuning to the bit."""

import json

import jax
import numpy as np
import pytest

from benchmarks.controls import ContinuedSASRec, FAMEBSARec
from fame_jax.main import main
from fame_jax.models import registry, surgery
from fame_jax.models.bsarec import CausalBSARec
from fame_jax.models.sasrec import SASRec


def test_every_parameter_is_that_of_the_backbone():
    module = ContinuedSASRec(num_items=9, width=8, num_heads=2, num_blocks=2, max_length=5)
    backbone = module.backbone_module()
    assert type(backbone) is SASRec and registry.values(backbone) == registry.values(module)
    old, new = (
        registry.init_params(m, jax.random.key(k)) for k, m in enumerate((backbone, module))
    )
    grown = surgery.transplant(old, new, module.surgery_plan(jax.random.key(2)))
    jax.tree.map(np.testing.assert_array_equal, grown, old)


def test_over_bsarec_the_first_block_and_the_attention_of_the_last_are_kept():
    options = {'num_items': 9, 'width': 8, 'num_blocks': 2, 'max_length': 5, 'filter_share': 0.3}
    module = FAMEBSARec(**options, num_experts=1)
    backbone = module.backbone_module()
    assert type(backbone) is CausalBSARec and backbone.filter_share == 0.3
    assert (backbone.similarity, backbone.num_heads) == ('cosine', 2)  # FAME's
    old, fresh = (
        registry.init_params(m, jax.random.key(k)) for k, m in enumerate((backbone, module))
    )
    grown = surgery.transplant(old, fresh, module.surgery_plan(jax.random.key(2)))
    jax.tree.map(np.testing.assert_array_equal, grown['block_0'], old['block_0'])
    assert 'root_beta' in grown['block_0'] and 'block_1' not in grown
    attention = old['block_1']['attention']
    for name in ('key', 'value', 'distance'):
        np.testing.assert_array_equal(grown['facet_block'][name], attention[name])
    np.testing.assert_array_equal(grown['facet_block']['query'][:, 0], attention['query'])


@pytest.mark.slow
def test_its_second_stage_starts_at_the_best_epoch_of_the_first(tmp_path):
    flags = [
        '--synthetic=users=120,items=40',
        '--width=8',
        '--pretrain_epochs=2',
        '--rows_per_step=4',
    ]
    model = '--model=benchmarks.controls:ContinuedSASRec'
    more = ['--finetune_epochs=1', '--progress=none', f'--workdir={tmp_path}']
    assert main([*flags, model, *more]) == 0
    lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    found = {
        (line['stage'], line['epoch']): line['ndcg@20']
        for line in lines
        if line['split'] == 'validation'
    }
    best = max(value for (stage, _), value in found.items() if stage == 'pretrain')
    assert found['finetune', 0] == best and found['finetune', 1] != best
