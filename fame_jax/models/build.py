"""The one table of models: name -> module, objective, backbone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import surgery
from fame_jax.config import Config
from fame_jax.models import (
    bert4rec,
    cl4srec,
    duorec,
    fame,
    iclrec,
    miasrec,
    msgifsr,
    objective,
)
from fame_jax.models.atten_mixer import AttenMixer
from fame_jax.models.bert4rec import BERT4Rec
from fame_jax.models.cl4srec import CL4SRec
from fame_jax.models.core import CORE
from fame_jax.models.duorec import DuoRec
from fame_jax.models.fame import FAME, FAMEBERT4Rec
from fame_jax.models.gru4rec import GRU4Rec
from fame_jax.models.iclrec import ICLRec
from fame_jax.models.miasrec import MiaSRec
from fame_jax.models.msgifsr import MSGIFSR
from fame_jax.models.sasrec import SASRec


class Row(NamedTuple):
    """One model of the house."""

    module: type[nn.Module]
    objective: Callable[..., Any]
    options: tuple[str, ...]  # config fields that the objective takes
    title: str  # in results
    layout: str = 'next'  # of training rows, see data/pipeline.py
    refresh: Callable[..., Any] | None = None  # before an epoch: what no gradient moves
    backbone: str | None = None  # what is pre-trained and turned into it
    plan: Callable[..., Any] | None = None  # how: (module, key, **plan_options) -> surgery.Plan
    plan_options: tuple[str, ...] = ()


LOGITS = 2**28  # of an accelerator at a time, 1 GiB

CHUNKS = ('chunk_tokens', 'chunk_items')
NEXT_ITEM = ('loss', 'num_negatives', 'negatives', *CHUNKS)
VIEWS = ('crop_share', 'mask_share', 'reorder_share')
CONTRAST = ('contrast_weight', 'contrast_temperature', 'contrast_anchors')
PLAN = ('expert_init', 'expert_noise')

MODELS = {
    'fame': Row(
        FAME,
        functools.partial(fame.balanced, objective.next_item),
        (*NEXT_ITEM, 'balance_weight'),
        title='FAME',
        backbone='sasrec',
        plan=fame.plan,
        plan_options=PLAN,
    ),
    'fame_bert4rec': Row(
        FAMEBERT4Rec,
        functools.partial(fame.balanced, bert4rec.cloze),
        ('cloze_rate', *CHUNKS, 'balance_weight'),
        title='FAME over BERT4Rec',
        layout='cloze',
        backbone='bert4rec',
        plan=fame.plan,
        plan_options=PLAN,
    ),
    'sasrec': Row(SASRec, objective.next_item, NEXT_ITEM, title='SASRec'),
    'gru4rec': Row(GRU4Rec, objective.next_item, NEXT_ITEM, title='GRU4Rec'),
    'bert4rec': Row(
        BERT4Rec,
        bert4rec.cloze,
        ('cloze_rate', *CHUNKS),
        title='BERT4Rec',
        layout='cloze',
    ),
    'core': Row(CORE, objective.next_item, NEXT_ITEM, title='CORE'),
    'cl4srec': Row(
        CL4SRec, cl4srec.contrast_views, (*NEXT_ITEM, *VIEWS, *CONTRAST), title='CL4SRec'
    ),
    'duorec': Row(
        DuoRec, duorec.contrast_pairs, (*NEXT_ITEM, *CONTRAST), title='DuoRec', layout='pairs'
    ),
    'iclrec': Row(
        ICLRec,
        iclrec.intent_contrast,
        (*NEXT_ITEM, *VIEWS, *CONTRAST, 'intent_weight'),
        title='ICLRec',
        refresh=iclrec.refresh,
    ),
    'atten_mixer': Row(AttenMixer, objective.next_item, NEXT_ITEM, title='Atten-Mixer'),
    'msgifsr': Row(MSGIFSR, msgifsr.mixture, CHUNKS, title='MSGIFSR', layout='prefixes'),
    'miasrec': Row(MiaSRec, miasrec.highest, ('chunk_tokens',), title='MiaSRec', layout='prefixes'),
}


def build(
    name: str, config: Config, num_items: int, mesh: jax.sharding.Mesh | None = None
) -> nn.Module:
    """The module of a model, its fields filled by name from the config."""
    module = MODELS[name].module
    values = {
        **dataclasses.asdict(config),
        'num_items': num_items,
        'mesh': mesh,
        'dtype': jnp.dtype(config.dtype),
    }
    own = {field.name for field in dataclasses.fields(module)} - {'parent', 'name'}
    return module(**{name: values[name] for name in own})


def initial(module: nn.Module, key: jax.Array) -> Any:
    """Fresh parameters of a model."""
    tokens_BL = jnp.ones((1, 1), jnp.int32)
    init = jax.jit(functools.partial(module.init, method='query_and_items'))
    return init(key, tokens_BL, tokens_BL * 0, tokens_BL)['params']


def build_objective(name: str, config: Config) -> Callable[..., Any]:
    """The model's objective(module, params, batch, key), its options filled from the config."""
    row = MODELS[name]
    options = _options(config, row.options)
    if options.get('chunk_tokens', 0) >= 0:
        return functools.partial(row.objective, **options)

    def objective(module: nn.Module, *arguments: Any, **more: Any) -> Any:
        at_a_time = config.chunk_items or module.num_items
        chunk = {'chunk_tokens': tokens_at_a_time(at_a_time, jax.default_backend())}
        return row.objective(module, *arguments, **options | chunk, **more)

    return objective


def tokens_at_a_time(num_items: int, backend: str) -> int:
    """How many tokens' logits over so many items a device had best hold at a time.

    On a CPU, 128 were the fastest. On an accelerator a chunk costs a dozen kernels whatever it
    holds, so that as many tokens are best as memory is to be had for.
    """
    return 128 if backend == 'cpu' else max(1, LOGITS // num_items)


def build_plan(name: str, config: Config, module: nn.Module, key: jax.Array) -> surgery.Plan:
    """How the model grows out of its backbone, the plan's options filled from the config."""
    row = MODELS[name]
    return row.plan(module, key, **_options(config, row.plan_options))


def _options(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
