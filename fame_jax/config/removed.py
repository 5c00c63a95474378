"""Flags of version 0.1 that are gone, and what replaces them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fame_jax.config.fields import canonical
from fame_jax.errors import UserError


class Removed(NamedTuple):
    """A former flag's default, and what replaces it, with {} for the value; '': nothing does."""

    default: str
    use: str


# NAME=DEFAULT of the former flags by what replaces them; {name} is the former name.
_GROUPS = {
    '--columns=user:{}': 'user_column=',
    '--columns=item:{}': 'item_column=',
    '--columns=time:{}': 'time_column=',
    '--columns=rating:{}': 'rating_column=',
    '--columns=item_file_id:{}': 'item_id_column=',
    '--synthetic={name}={}': 'synthetic_users=4000 synthetic_items=1000 synthetic_facets=2 '
    'synthetic_values=8 synthetic_seed=0',
    '--text_options={name}={}': 'text_epochs=50 text_learning_rate=0.001 text_labels_per_step=64 '
    'text_items_per_label=4 text_temperature=0.07 text_inner_width=256 text_dropout=0.1 '
    'text_alternation=step shuffled_labels=false rarest_label=2 commonest_label=0.3',
    '--model_options={name}={}': 'attention_bias=true attention_scale=head routing=outputs '
    'attention_residual=norm output_projection=drop expert_init=upcycle expert_noise=0.02 '
    'facet_init=slices gate_scale=heads ffn_shared=true active_experts=0 balance_weight=0 '
    'hidden_width=128 item_dropout=0.2 crop_share=0.6 mask_share=0.3 reorder_share=0.6 '
    'contrast_weight=0.1 contrast_temperature=1 contrast_anchors=128 intent_weight=0.1 '
    'pooling_norm=4 entmax_alpha=1.5 highest_weight=0.9',
    '--model_options=remat=true': 'remat=none',
    '--model_options=mask_prob={}': 'cloze_rate=0.2',
    '--model_options=num_clusters={}': 'intents=256',
    '--model_options=num_levels={}': 'levels=7',
    '--model_options=max_unit={}': 'order=1',
    '--loss_chunk={},0': 'chunk_tokens=-1',
    '--loss_chunk=-1,{}': 'chunk_items=0',
    '--backbone={}': 'finetune_from=pretrain backbone_from=',
    '--items={}': 'titles=',
    '--out={}': 'recommendations= explanation= export= report=',
    '--cache_dir={}': 'compilation_cache= text_cache=',
    '--distributed={},RANK/N': 'coordinator=',
    '--distributed=HOST:PORT,RANK/{}': 'num_processes=1',
    '--distributed=HOST:PORT,{}/N': 'process=0',
    '--checkpoint_seconds=SECONDS': 'checkpoint_every=0',
    '': 'text_design=independent text_decorrelation=0 text_orthogonality=0 item_training=trained '
    'activation=gelu inner_multiple=4 tied_items=true attention=einsum attention_dropout=-1 '
    'facet_learned=true packed=true loss_positions=all random_bits=threefry adam_b2=0.999 '
    'eval_users=1024 eval_items=0',
}
REMOVED = {
    name: Removed(default, use.replace('{name}', re.sub('^(text|synthetic)_', '', name)))
    for use, flags in _GROUPS.items()
    for name, _, default in (flag.partition('=') for flag in flags.split())
}
# Those that did not change what a run computes: a flags.cfg may have any value of them.
_RUNTIME = re.compile('--(items|out|cache_dir|distributed|checkpoint_seconds)=')
# Models and readings that had other defaults, and have them still.
_ITEM_DROPOUT = {'item_dropout': '0.1'}
_BY_MODEL = {
    'iclrec': {'crop_share': '0.2', 'mask_share': '0.7', 'reorder_share': '0.2'},
    'atten_mixer': _ITEM_DROPOUT,
    'miasrec': _ITEM_DROPOUT,
}
_PAPER = dict.fromkeys(('expert_init', 'facet_init'), 'random')
_PAPER |= {'attention_residual': 'none', 'gate_scale': 'one'}


def refusal(name: str, value: str, where: str) -> UserError:
    """The error for a removed flag: its name, and what to use."""
    use = REMOVED[name].use.replace('{}', value or 'VALUE')
    advice = f'use {use}' if use else 'nothing replaces it, leave it out'
    return UserError(f'{where}: was --{name}; {advice}')


def convert(lines: Sequence[tuple[str, str]], stored: bool) -> list[tuple[str, str]]:
    """Drops the removed flags of a flag file of version 0.1, where they had their defaults.

    Args:
      lines: (place, flag) for each line of the file.
      stored: whether the file is the flags.cfg of a run, whose runtime flags do not count.

    Raises:
      UserError: for a removed flag with another value, naming its replacement.
    """
    given = [_split(flag) for _, flag in lines]
    if not any(name in REMOVED for name, _ in given):
        return list(lines)
    values = dict(given)
    usual = {name: removed.default for name, removed in REMOVED.items()}
    usual |= _BY_MODEL.get(values.get('model', ''), {})
    usual |= _PAPER if values.get('reading') == 'paper' else {}
    kept = []
    for line, (name, value) in zip(lines, given):
        if name not in REMOVED:
            kept += [] if (name, value) == ('reading', 'warm') else [line]
        elif canonical(value) != usual[name]:
            runtime = _RUNTIME.match(REMOVED[name].use) or name in ('eval_users', 'eval_items')
            if not (stored and runtime):
                raise refusal(name, value, line[0])
    return kept


def _split(flag: str) -> tuple[str, str]:
    """Name and value of a flag in a file; --noNAME is NAME with the value false."""
    name, equals, value = flag.lstrip('-').partition('=')
    if not equals and name.removeprefix('no') in REMOVED:
        return name.removeprefix('no'), str(name in REMOVED).lower()
    return name, value
