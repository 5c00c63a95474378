"""What each baseline's own paper or code sets otherwise than the defaults of Config.

A value is here only where the model is another without it. What belongs to the protocol is alike
for all: data, split, width 64, 50 items, Adam at 1e-3, early stopping, and cross-entropy over the
catalogue. CL4SRec, DuoRec and ICLRec stand on the backbone that SASRec and FAME have here, so that
what sets them apart is their contrast alone.
"""

from typing import Any

ALONE = ('prepare', 'pretrain', 'evaluate')

CLOZE = {'similarity': 'dot', 'positions': 'start', 'dropout': 0.1}

RECIPES: dict[str, dict[str, Any]] = {
    'sasrec': {'stages': ALONE},
    # RecBole's GRU4Rec.yaml.
    'gru4rec': {'stages': ALONE, 'similarity': 'dot', 'dropout': 0.3},
    # SSLRec's bert4rec.yml; absolute positions as in the paper. An epoch asks for a fifth of the
    # items, so there are five times as many, and five times the patience.
    'bert4rec': {'stages': ALONE, **CLOZE, 'pretrain_epochs': 300, 'patience': 25},
    'fame_bert4rec': {**CLOZE, 'pretrain_epochs': 300, 'finetune_epochs': 300, 'patience': 25},
    'core': {'stages': ALONE, 'positions': 'start'},
    'cl4srec': {'stages': ALONE},
    'duorec': {'stages': ALONE},
    # run_*.sh of the authors.
    'iclrec': {'stages': ALONE, 'crop_share': 0.2, 'mask_share': 0.7, 'reorder_share': 0.2},
    # main_area_semantic.py of the authors.
    'atten_mixer': {
        'stages': ALONE,
        'temperature': 1 / 16,
        'num_heads': 8,
        'dropout': 0.1,
        'item_dropout': 0.1,
    },
    # The authors' script, but for their width; its units are of one item, the default of --order.
    'msgifsr': {
        'stages': ALONE,
        'num_blocks': 1,
        'temperature': 1 / 12,
        'num_heads': 8,
        'dropout': 0.1,
        'rows_per_step': 256,
    },
    'miasrec': {'stages': ALONE, 'dropout': 0.1, 'item_dropout': 0.1, 'rows_per_step': 256},
}
