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
from fame_jax.models import fame, objective
from fame_jax.models.fame import FAME
from fame_jax.models.sasrec import SASRec


class Row(NamedTuple):
    """One model of the house."""

    module: type[nn.Module]
    objective: Callable[..., Any]
    options: tuple[str, ...]  # config fields that the objective takes
    title: str  # in results
    backbone: str | None = None  # what is pre-trained and turned into it
    plan: Callable[..., Any] | None = None  # how: (module, key, **plan_options) -> surgery.Plan
    plan_options: tuple[str, ...] = ()


NEXT_ITEM_OPTIONS = ('loss', 'num_negatives', 'chunk_tokens', 'chunk_items')

MODELS = {
    'fame': Row(
        FAME,
        objective.next_item,
        NEXT_ITEM_OPTIONS,
        title='FAME',
        backbone='sasrec',
        plan=fame.plan,
        plan_options=('expert_init', 'expert_noise'),
    ),
    'sasrec': Row(SASRec, objective.next_item, NEXT_ITEM_OPTIONS, title='SASRec'),
}


def build(name: str, config: Config, num_items: int) -> nn.Module:
    """The module of a model, its fields filled by name from the config."""
    module = MODELS[name].module
    values = {
        **dataclasses.asdict(config),
        'num_items': num_items,
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
    options = {name: getattr(config, name) for name in row.options}

    def objective_of(module: nn.Module, params: Any, batch: Any, key: Any) -> Any:
        return row.objective(module, params, batch, key, **options)

    return objective_of


def build_plan(name: str, config: Config, module: nn.Module, key: jax.Array) -> surgery.Plan:
    """How the model grows out of its backbone, the plan's options filled from the config."""
    row = MODELS[name]
    return row.plan(module, key, **{option: getattr(config, option) for option in row.plan_options})
