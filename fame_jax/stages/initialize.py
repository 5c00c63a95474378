"""What a stage's parameters start from: random values, item vectors, or a backbone."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fame_jax import run_dir
from fame_jax.config import FLAGS
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import show
from fame_jax.errors import UserError
from fame_jax.models import registry, surgery
from fame_jax.models.item_model import ItemModel
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.stages import settings
from fame_jax.stages.context import RunContext, abstract_params
from fame_jax.stages.facet_names import num_branches, num_heads
from fame_jax.text import item_init

Array = jax.Array
Tree = Any


def draw_params(context: RunContext, stage: str, module: ItemModel, key: Array) -> Tree:
    """Freshly initialised parameters of a stage, with their shardings.

    Random draws of many shapes take XLA as long to compile as a small model's step; runs that share
    their programs compile them once.

    Args:
      context: the run.
      stage: 'pretrain' or 'finetune'.
      module: that the stage trains.
      key: the stage's key.
    """
    init = functools.partial(registry.init_params, module)
    name = f'{stage}: initial parameters'
    program = context.programs.setdefault(name, mesh_lib.init_sharded(init, context.mesh))
    return program(jax.random.fold_in(key, 0))


def draw_grown_params(module: ItemModel, old: Tree, key: Array) -> Tree:
    """Freshly initialised parameters for a larger catalogue, as far as they have rows for items.

    Args:
      module: with more items.
      old: the same model's parameters with fewer items, or their shapes.
      key: the stage's key.

    Returns:
      The tree of the parameters. A leaf whose shape is not that of `old` is a numpy array with the
      values of `draw_params`; any other is a `jax.ShapeDtypeStruct`.
    """
    shapes = flax.traverse_util.flatten_dict(abstract_params(module))
    before = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(old).items()}
    grown = [path for path, leaf in shapes.items() if before.get(path) != leaf.shape]

    def init(key: Array) -> dict[tuple[str, ...], Array]:
        # XLA leaves out the draws of all others.
        drawn = flax.traverse_util.flatten_dict(registry.init_params(module, key))
        return {path: drawn[path] for path in grown}

    drawn = jax.device_get(jax.jit(init)(jax.random.fold_in(key, 0)))
    return flax.traverse_util.unflatten_dict(shapes | drawn)


def make_zeros(module: ItemModel, mesh: Mesh | None) -> Tree:
    """Zeros in the shapes of a module's parameters, with their shardings."""
    shapes = abstract_params(module)
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    return mesh_lib.init_sharded(functools.partial(fill, shapes), mesh)()


def initialize(context: RunContext, stage: str, params: Tree, key: Array) -> Tree:
    """The parameters before a stage's first step.

    Args:
      context: the run.
      stage: 'pretrain' or 'finetune'.
      params: freshly initialised.
      key: the stage's key.

    Raises:
      UserError: when the backbone or the item vectors are missing or do not fit.
    """
    config = context.config
    if stage == 'finetune' and config.training.backbone != 'scratch':
        return from_backbone(context, params, key)
    text = config.text
    if text.item_init == 'random':
        return params
    source = config.training.backbone
    run = source if source not in ('pretrain', 'scratch') else context.folder
    folder = Path(run) / 'text'
    if text.item_init == 'text':
        _check_heads(context, folder)
    item_VD = item_init.read(
        text.item_init,
        folder,
        context.data.num_items,
        context.model.width,
        context.data.card['fingerprint'],
    )
    return item_init.fill(params, item_VD, text.item_scale)


def _check_heads(context: RunContext, folder: Path) -> None:
    """Refuses item vectors that the stage text made for another number of heads or branches."""
    if not (folder / 'text.json').is_file():
        return
    record, model = run_dir.read_json(folder / 'text.json'), context.model
    made = record.get('branches', 1)
    made_heads = len(record.get('heads', [])) // made
    heads, branches = num_heads(model) or made_heads, num_branches(model)
    if (made_heads, made) != (heads, branches):
        in_made, in_these, change = '', '', '--num_heads'
        if (made, branches) != (1, 1):
            in_made, in_these = f' in each of {made} branches', f' in each of {branches}'
            change = '--num_heads or --model_options=branches'
        raise UserError(
            f'{folder} was made for {made_heads} heads{in_made}, and the model has {heads}'
            f'{in_these}; change {change}, or remove the folder and run --stages=text'
        )


def check_backbone(context: RunContext) -> None:
    """Checks that fine-tuning has a backbone to start from.

    Raises:
      UserError: when the backbone is missing, not finished, or of other data or options.
    """
    source = context.config.training.backbone
    if source == 'scratch':
        return
    folder = _backbone_folder(context)
    if not (folder / 'checkpoints' / 'pretrain').is_dir():
        raise run_dir.several_runs(folder, f'--backbone={source}') or UserError(
            f'{folder} holds no checkpoints of pretrain, so there is no backbone to fine-tune; add '
            'pretrain to --stages, or train from random values with --backbone=scratch'
        )
    if source != 'pretrain':
        _refuse_other_backbone(context, source, context.module('pretrain'))
    with context.checkpoints('pretrain', str(folder)) as checkpoints:
        if not checkpoints.progress().get('finished'):
            raise UserError(
                f'{checkpoints.folder} holds no finished backbone; run its stage pretrain first'
            )


def from_backbone(context: RunContext, params: Tree, key: Array) -> Tree:
    """The pre-trained backbone's parameters, turned into FAME's by surgery."""
    backbone = context.trained_module('pretrain', context.mesh)
    with context.checkpoints('pretrain', str(_backbone_folder(context))) as checkpoints:
        pretrained = checkpoints.restore(best=abstract_params(backbone))['best']
    plan = context.module('finetune').surgery_plan(jax.random.fold_in(key, 2))
    return surgery.transplant(pretrained, params, plan)


def _backbone_folder(context: RunContext) -> Path:
    """The folder of the run whose backbone is fine-tuned."""
    source = context.config.training.backbone
    return context.folder if source == 'pretrain' else Path(source)


def _refuse_other_backbone(context: RunContext, source: str, backbone: ItemModel) -> None:
    """Refuses a backbone with other options, which could fit by its shapes all the same."""
    theirs, other = settings.complete(config_flags.Given({'workdir': source}))
    other = other.backbone_module() if other.backbone else other
    ours, others = registry.values(backbone), registry.values(other)
    differ = [
        f'{"--" if name in FLAGS else "--model_options="}{name}={value} (there: {others.get(name)})'
        for name, value in ours.items()
        if name != 'dropout' and others.get(name) != value
    ]
    text = theirs.text
    mine = context.config.text
    names = [field.name for field in dataclasses.fields(mine)]
    always = ('item_init', 'unseen_items', 'text_path', 'text_path_below')
    for name in names if text.uses_texts else always:
        if getattr(mine, name) != getattr(text, name):
            here, there = show(getattr(mine, name)), show(getattr(text, name))
            differ.append(f'--{name}={here} (there: {there})')
    if differ:
        raise UserError(f'--backbone={source} is another model: {", ".join(differ)}')
