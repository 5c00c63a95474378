"""The table of models, and modules made from names and options."""

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fame_jax.errors import UserError
from fame_jax.models import options as option_types
from fame_jax.models import text_path
from fame_jax.models.atten_mixer import AttenMixer
from fame_jax.models.bert4rec import BERT4Rec
from fame_jax.models.branches import (
    BranchedBSARec,
    BranchedFAME,
    BranchedSASRec,
    BranchedTVRec,
)
from fame_jax.models.bsarec import BSARec, CausalBSARec
from fame_jax.models.cl4srec import CL4SRec
from fame_jax.models.core import CORE
from fame_jax.models.duorec import DuoRec
from fame_jax.models.esasrec import ESASRec
from fame_jax.models.fame import FAME, FAMEBERT4Rec
from fame_jax.models.gru4rec import GRU4Rec
from fame_jax.models.hstu import HSTU
from fame_jax.models.iclrec import ICLRec
from fame_jax.models.item_model import ItemModel
from fame_jax.models.miasrec import MiaSRec
from fame_jax.models.msgifsr import MSGIFSR
from fame_jax.models.pooling import HistoryMean, LastItem
from fame_jax.models.sasrec import SASRec
from fame_jax.models.tvrec import CausalTVRec, TVRec

MODELS: dict[str, type[ItemModel]] = {
    'fame': FAME,
    'fame_bert4rec': FAMEBERT4Rec,
    'sasrec': SASRec,
    'gru4rec': GRU4Rec,
    'bert4rec': BERT4Rec,
    'core': CORE,
    'cl4srec': CL4SRec,
    'duorec': DuoRec,
    'iclrec': ICLRec,
    'atten_mixer': AttenMixer,
    'msgifsr': MSGIFSR,
    'miasrec': MiaSRec,
    'hstu': HSTU,
    'esasrec': ESASRec,
    'bsarec': BSARec,
    'causal_bsarec': CausalBSARec,
    'tvrec': TVRec,
    'causal_tvrec': CausalTVRec,
    'branched_sasrec': BranchedSASRec,
    'branched_bsarec': BranchedBSARec,
    'branched_tvrec': BranchedTVRec,
    'branched_fame': BranchedFAME,
    'last_item': LastItem,
    'history_mean': HistoryMean,
}

# Options that change memory or time and no result, which `label` leaves out.
UNLABELLED = ('remat', 'partition_chunk')


def find(name: str) -> type[ItemModel]:
    """The class of a model.

    Args:
      name: a name of `MODELS`, or 'package.module:Class' for a class outside of the package; its
        module is also looked up in the current folder.

    Raises:
      UserError: there is no such model.
    """
    if ':' in name:
        return _import_class(name)
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f'did you mean {close[0]}?' if close else f'choose from {", ".join(MODELS)}'
        raise UserError(f'--model={name}: there is no such model; {hint}')
    return MODELS[name]


def _import_class(name: str) -> type[ItemModel]:
    module_name, _, class_name = name.partition(':')
    if not {'', os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module keeps its traceback.
        if not (error.name and f'{module_name}.'.startswith(f'{error.name}.')):
            raise
        raise UserError(
            f'--model={name}: there is no Python module {module_name}; run from its folder, or add '
            'that folder to PYTHONPATH'
        ) from error
    except ValueError as error:
        raise UserError(f'--model={name} is not of the form package.module:Class') from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, ItemModel)):
        raise UserError(f'--model={name}: {module_name} has no ItemModel class {class_name!r}')
    return cls


def options(cls: type[ItemModel]) -> dict[str, Any]:
    """The options of a model class and their defaults, in the order of its fields.

    These are all of its fields but num_items, dtype, mesh and text_width.
    """
    return {name: option.default for name, option in option_types.of(cls).items()}


def values(module: ItemModel) -> dict[str, Any]:
    """The values of a module's options by name, in the order of its fields."""
    return {name: getattr(module, name) for name in options(type(module))}


def validate(module: ItemModel) -> None:
    """Checks a module that was made by hand.

    Raises:
      UserError: a value is not of its option's type, choices or range, or options contradict each
        other.
    """
    try:
        for name, value in values(module).items():
            option_types.parse(type(module), name, value)
        module.validate()
    except ValueError as error:
        raise UserError(f'{type(module).__name__}: {error}') from error


def make(
    name: str,
    options: Mapping[str, Any],
    *,
    reading: str = '',
    num_items: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
) -> ItemModel:
    """Makes a module.

    Args:
      name: as in `find`.
      options: values by option name, as text or of the option's type; None: the default.
      reading: one of the class's named sets of options, such as 'paper'; `options` override it.
      num_items: V.
      mesh: the devices that share the item table; None: one device.
      dtype: of activations.

    Raises:
      UserError: an option is unknown, or its value is not of its type, choices or range, or options
        contradict each other.
    """
    cls = find(name)
    if reading and reading not in cls.readings:
        known = ', '.join(cls.readings) or 'none'
        raise UserError(
            f'--reading={reading}: {cls.title} has no such reading; it has {known}; after a flag '
            'file that gives one add --reading='
        )
    given = dict(cls.readings[reading]) if reading else {}
    given |= {option: value for option, value in options.items() if value is not None}
    try:
        values = {option: option_types.parse(cls, option, value) for option, value in given.items()}
        module = cls(**values, num_items=num_items, mesh=mesh, dtype=jnp.dtype(dtype))
        module.validate()
    except ValueError as error:
        raise UserError(f'--{error}') from error
    return module


def init_params(module: ItemModel, key: jax.Array) -> Any:
    """Freshly initialised parameters of a model."""
    tokens_BL = jnp.ones((1, 1), jnp.int32)
    init = jax.jit(functools.partial(module.init, method='forward'))
    params = init(key, tokens_BL, tokens_BL * 0, tokens_BL)['params']
    if not module.text_width:
        return params
    path_key = jax.random.fold_in(key, text_path.DRAW)
    path = text_path.init(path_key, module.text_width, module.width)
    return {**params, text_path.NAME: path}


def label(module: ItemModel) -> str:
    """The model's title and the options that differ from its defaults, for tables of results.

    FAME always shows its heads (H) and experts (N); a complete reading is shown by its name.
    """
    cls = type(module)
    values = {name: getattr(module, name) for name in option_types.of(cls)}
    changed = {
        name: value
        for name, value in values.items()
        if value != options(cls)[name] and name not in UNLABELLED
    }
    parts = []
    if 'num_experts' in values:
        parts += [f'H {values["num_heads"]}', f'N {values["num_experts"]}']
        changed = {n: v for n, v in changed.items() if n not in ('num_heads', 'num_experts')}
    for reading, read in cls.readings.items():
        if all(values[name] == value for name, value in read.items()):
            parts.append(f'{reading} reading')
            changed = {name: value for name, value in changed.items() if name not in read}
    parts += [f'{name} {_text(value)}' for name, value in changed.items()]
    if jnp.dtype(module.dtype) != jnp.float32:
        parts.append(jnp.dtype(module.dtype).name)
    return cls.title + (f' ({", ".join(parts)})' if parts else '')


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
