"""The settings of a run from flags, its folder's flags.cfg and the model's class."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fame_jax import run_dir
from fame_jax.config import FLAGS, SECTIONS, Config, binds, differences
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import no_effect, show
from fame_jax.data.split import parse_moment
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models import registry
from fame_jax.models.item_model import ItemModel
from fame_jax.stages import text_settings, updated_run

# Stages that make a run, of which two train a model; the others use one.
TRAINING_STAGES = ('prepare', 'text', 'pretrain', 'finetune', 'update', 'evaluate')
TRAINED = ('pretrain', 'finetune')
UPDATE_STAGES = ('update', 'evaluate')
# Flags that an update may change; all others are those of its run.
OF_UPDATES = (
    *('append', 'from_run', 'replay', 'seed', 'pretrain_epochs', 'finetune_epochs', 'patience'),
    *('learning_rate', 'finetune_learning_rate', 'schedule', 'warmup_epochs', 'rows_per_step'),
    *('select_on', 'validation_users', 'items', 'text_encoder', 'finetune_dropout'),
    'split_at',
)
# Flags of finetune alone, but for its epochs and rate, which scripts give for all models alike.
OF_FINETUNE = ('finetune_dropout', 'finetune_future_targets')
ITEM_FILE_ID = 'item_file_id:'  # begins the pair of --columns that is of the item file


def complete(given: config_flags.Given, model: ItemModel | None = None) -> tuple[Config, ItemModel]:
    """The settings of a run, with all options of the model, and the model's module.

    A value comes from the command, else from the folder's flags.cfg, else from the `recipe` of the
    model's class, else it is the field's default.

    Args:
      given: the flags of the command.
      model: a module that takes the place of --model and its options.

    Raises:
      UserError: for settings that do not fit together, or that differ from what the folder's run
        has already used.
    """
    folder = Path(given.workdir)
    stored = _read_stored(folder)
    run_dir.check_single(folder, given.get('stages'))
    updated_run.check_folder(given)
    of_update = not stored and given.get('append') and given.get('from_run')
    if of_update:
        stored = updated_run.starting_values(given, _read_stored(Path(given.get('from_run'))))
    given = _use_prepared(given, stored)
    if model is not None:
        given = dataclasses.replace(given, values=_with_model(given.values, model))
    name = given.values.get('model', stored.get('model', given.get('model')))
    kind = type(model) if model is not None else registry.find(name)
    config = _complete(given, _of_data_set(given, stored, folder), kind)
    if not config.run.stages and config.update.append:
        config = config.replace(stages=UPDATE_STAGES)
    if not config.run.stages:
        config = config.replace(stages=default_stages(kind, config.training.backbone))
    if model is None:
        options = config.model.options
        if 'max_length' in registry.options(kind):
            options['max_length'] = config.data.max_length
        model = _make(name, options, config.model.reading)
    registry.validate(model)
    _refuse_temperature(given, stored, model)
    _refuse_finetune(given, kind)
    config = config.with_model_options(registry.values(model))
    _check(config, kind)
    if of_update:
        _refuse_other_settings(config, stored, kind)
    _refuse_other_run(config, stored, kind, folder)
    text_settings.check_texts(given, config, model)
    return config, model


def _make(name: str, options: dict[str, Any], reading: str) -> ItemModel:
    """The module; an error names --model_options where an option has no flag of its own."""
    try:
        return registry.make(name, options, reading=reading)
    except UserError as error:
        line = str(error).removeprefix('--')
        option = line.partition('=')[0]
        if option not in options:
            raise
        flag = '' if option in FLAGS else 'model_options='
        if option not in registry.options(registry.find(name)):
            line += f'; --{flag}{option}= takes back that of a flag file'
        raise UserError(f'--{flag}{line}') from error


def _refuse_finetune(given: config_flags.Given, kind: type[ItemModel]) -> None:
    """Refuses typed flags of fine-tuning for a model without it; a flag file may have them."""
    for name in OF_FINETUNE:
        if name in given.typed and name in given.values and not kind.backbone:
            raise UserError(
                f'--{name}={show(given.values[name])} has no effect on {kind.title}, which has no '
                'stage finetune; leave it out'
            )


def _refuse_temperature(
    given: config_flags.Given, stored: Mapping[str, Any], model: ItemModel
) -> None:
    """Refuses a temperature for inner products, which are not divided by it."""
    value = given.values.get('temperature', type(model).temperature)
    known = (type(model).temperature, stored.get('temperature'))
    if model.similarity == 'dot' and value not in known:
        raise no_effect(f'temperature={value}', 'similarity=dot', 'add --similarity=cosine')


def _with_model(values: Mapping[str, Any], model: ItemModel) -> dict[str, Any]:
    """Flags with those that a module sets: its class, and fields that are flags of other sections.

    Raises:
      UserError: where such a field has another value than its flag.
    """
    fields = {'dtype': jnp.dtype(model.dtype).name}
    if hasattr(model, 'max_length'):
        fields['max_length'] = model.max_length
    default = type(model)()
    for name, value in fields.items():
        if name in values and value not in (values[name], getattr(default, name)):
            raise UserError(
                f'{name}: the model has {value}, and the training {values[name]}; give one of them'
            )
    return {**fields, **values, 'model': name_of(type(model))}


def _complete(given: config_flags.Given, stored: dict[str, Any], kind: type[ItemModel]) -> Config:
    return config_flags.complete(
        given, stored, kind.recipe, row_layout=kind.row_layout, options=registry.options(kind)
    )


def _of_data_set(given: config_flags.Given, stored: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The stored values, without those that belong to another data set than the given one."""
    if given.values.get('dataset', stored.get('dataset')) == stored.get('dataset'):
        return stored
    if _used_sections(folder) or stored.get('prepared'):
        names = {'synthetic', 'columns'}
    else:  # of a prepare that was killed
        names = {name for name in stored if binds(name) == 'data'}
    return {name: value for name, value in stored.items() if name not in names}


def _use_prepared(given: config_flags.Given, stored: dict[str, Any]) -> config_flags.Given:
    """Adds the data flags of the run in --prepared to `stored`; its data were made with them."""
    prepared = _find_prepared(given.get('prepared'))
    own = _find_prepared(stored.get('prepared', ''))
    if prepared and not (own and has_data(Path(own))):
        own = own and prepared  # a run whose data have moved
    if prepared or own:
        others = _read_stored(Path(prepared or own))
        data = {name for name in others if binds(name) == 'data'} - {'prepared'}
        if stored:  # a run keeps the id of its own item file, which is no column of the log
            others['columns'] = (
                *(pair for pair in others.get('columns', ()) if not pair.startswith(ITEM_FILE_ID)),
                *(pair for pair in stored.get('columns', ()) if pair.startswith(ITEM_FILE_ID)),
            )
        stored |= {name: others[name] for name in data}
        stored.setdefault('prepared', prepared)
        stored['prepared'] = own or stored['prepared']
    return dataclasses.replace(
        given, values={**given.values, **({'prepared': prepared} if prepared else {})}
    )


def _find_prepared(folder: str) -> str:
    """The folder itself, or the one whose data the run in it uses.

    Raises:
      UserError: when that one holds no data.
    """
    seen = [folder]
    while folder and not has_data(Path(folder)):
        # All seeds of a run with --seeds use the same data.
        run = next(iter(run_dir.seed_folders(Path(folder))), Path(folder))
        folder = _read_stored(run).get('prepared', '')
        if folder in seen:
            folder = ''
        if folder:
            seen.append(folder)
    if not folder and len(seen) > 1:
        raise UserError(
            f'--prepared={seen[0]} uses the data of {seen[-1]}, which holds no prepared data; give '
            'the folder of a run that has finished --stages=prepare'
        )
    return folder or seen[0]


def no_data(prepared: str) -> UserError:
    """The error for a folder in --prepared that holds no prepared data."""
    return UserError(
        f'--prepared={prepared} holds no prepared data; give the folder of a run that has '
        'finished --stages=prepare'
    )


def has_data(folder: Path) -> bool:
    """Whether a run's folder holds prepared data."""
    with explain_os_errors(f'looking for prepared data in {folder}', 'choose another folder'):
        return (folder / 'dataset' / 'dataset.json').is_file()


def default_stages(kind: type[ItemModel], backbone: str = 'pretrain') -> tuple[str, ...]:
    """The stages of a model from data to results; `backbone` as --backbone."""
    pretrain = ('pretrain',) if backbone == 'pretrain' else ()
    finetune = ('finetune',) if kind.backbone else ()
    return ('prepare', *pretrain, *finetune, 'evaluate')


def name_of(kind: type[ItemModel]) -> str:
    """The value of --model that names a class."""
    names = {row: name for name, row in registry.MODELS.items()}
    return names.get(kind, f'{kind.__module__}:{kind.__qualname__}')


def label(config: Config, module: ItemModel, stage: str) -> str:
    """A model as results name it: its title and what differs from the defaults."""
    extra = []
    if config.loss.loss != 'ce':
        extra.append(config.loss.loss)
    if stage == 'finetune' and config.training.backbone == 'scratch':
        extra.append('from scratch')
    extra += _label_training(config, stage)
    if config.text.unseen_items != 'trained':
        extra.append('unseen items kept')
    text = config.text
    if text.text_path:
        extra.append(f'text_path {text.text_path:g} below {text.text_path_below}')
    if text.item_init == 'text':
        options = text.options
        extra += [] if text.text_encoder == 'tfidf' else [f'text_encoder {text.text_encoder}']
        extra += [f'{n} {v}' for n, v in options.items() if n in SHOWN and v != SHOWN[n]]
    elif text.item_init != 'random':
        extra.append(f'item_init {text.item_init}')
    plus = '+' if text.item_init == 'text' and module.backbone else ''
    title = registry.label(module)
    head, _, tail = title.partition(' (')
    parts = [*([tail.rstrip(')')] if tail else []), *extra]
    name, comma, form = head.partition(',')  # such as 'FAME' and 'branched'
    return name + plus + comma + form + (f' ({", ".join(parts)})' if parts else '')


def _label_training(config: Config, stage: str) -> list[str]:
    """What differs from the defaults in the labels, weights and steps of a stage."""
    shares, training, loss = config.loss.shares(stage), config.training, config.loss
    extra = [f'future_targets {",".join(f"{share:g}" for share in shares)}'] * (len(shares) > 1)
    extra += [f'seen_weight {loss.seen_weight:g}'] * (loss.seen_weight != 1)
    extra += [f'ema {training.ema:g}'] * (training.ema != 0)
    extra += ['updated'] * bool(config.update.append)
    extra += [f'schedule {training.schedule}'] * (training.schedule != 'constant')
    return extra


# Text options that set one FAME+ apart from another in results.
SHOWN = {'alternation': 'step', 'shuffled_labels': 'false'}


def _read_stored(folder: Path) -> dict[str, Any]:
    path = folder / 'flags.cfg'
    with explain_os_errors(f'--workdir={folder}', 'choose another folder'):
        exists = path.is_file()
    return config_flags.read(path) if exists else {}


def _check(config: Config, kind: type[ItemModel]) -> None:
    """Refuses settings that the model's class does not support."""
    name, stages = config.model.model, config.run.stages
    if config.data.split == 'time':
        parse_moment(config.data.split_at)
    if not kind.backbone and 'finetune' in stages:
        others = [stage for stage in stages if stage != 'finetune'] or default_stages(kind)
        raise UserError(f'--model={name} has no stage finetune; use --stages={",".join(others)}')
    if not kind.backbone and config.training.backbone != 'pretrain':
        raise UserError(
            f'--backbone={config.training.backbone} has no effect on --model={name}, which has no '
            'backbone; leave it out'
        )
    if config.loss.loss not in kind.losses:
        raise UserError(
            f'--loss={config.loss.loss} is not for --model={name}, which has a loss of its own; '
            'leave it out'
        )
    _check_labels(config, kind)
    if config.devices.model_parallel > 1 and not kind.shardable_items:
        able = [n for n, row in registry.MODELS.items() if row.shardable_items]
        raise UserError(
            f'--model_parallel={config.devices.model_parallel} is not for --model={name}, whose '
            f'loss needs the whole item table; it is for {", ".join(able)}'
        )


def _check_labels(config: Config, kind: type[ItemModel]) -> None:
    """Refuses soft labels and heavier seen items for models whose losses do not have them."""
    name, loss = config.model.model, config.loss
    # A class with a loss of its own does not read these.
    own_loss = kind.item_loss is not ItemModel.item_loss
    for flag in ('future_targets', 'finetune_future_targets', 'seen_weight'):
        value = getattr(loss, flag)
        if own_loss and value != FLAGS[flag].default:
            raise UserError(
                f'--{flag}={show(value)} is not for --model={name}, which has a loss of its own; '
                'leave it out'
            )


def _used_sections(folder: Path) -> set[str]:
    """The sections of flags that the folder's run has used, as `differences` takes them."""
    sections: set[str] = set()
    if has_data(folder):
        sections |= {'data', 'update'}
    if (folder / 'text' / 'text.json').is_file():
        sections |= {'run', 'data', 'text'}
    if _has_checkpoints(folder, '*'):
        sections |= set(SECTIONS) - {'serving', 'devices'}
    if _has_checkpoints(folder, 'finetune'):
        sections.add('finetune')
    return sections


def _has_checkpoints(folder: Path, stage: str) -> bool:
    return any((folder / 'checkpoints').glob(f'{stage}/*'))


def _refuse_other_settings(config: Config, stored: dict[str, Any], kind: type[ItemModel]) -> None:
    """Refuses flags of an update that change the model or the data of its run."""
    run = config.update.from_run
    same = {name: value for name, value in config.flat().items() if name in OF_UPDATES}
    before = _complete(config_flags.Given({}), stored, kind)
    defaults = registry.options(kind) | kind.readings.get(before.model.reading, {})
    before = before.with_model_options(defaults | before.model.options).replace(**same)
    differ = differences(config, before, set(SECTIONS) | {'finetune'})
    # As --items it may be another one, of which new items have their texts.
    differ = [one for one in differ if not one.startswith(f'--columns={ITEM_FILE_ID}')]
    if differ:
        raise UserError(
            f'--from={run}: an update keeps the settings of its run; leave out {", ".join(differ)}'
        )


def _refuse_other_run(
    config: Config, stored: dict[str, Any], kind: type[ItemModel], folder: Path
) -> None:
    """Refuses settings other than those that the folder's run has already used."""
    sections = _used_sections(folder)
    if config.data.prepared:
        sections.add('data')
    if not stored or not sections:
        return
    before = _complete(config_flags.Given({}), stored, kind)
    # A flags.cfg of version 0.1 lacks options, which then had their defaults.
    defaults = registry.options(kind) | kind.readings.get(before.model.reading, {})
    before = before.with_model_options(defaults | before.model.options)
    grown = tuple(f'--{name}=' for name in _grown_limits(config, before, folder))
    differ = [one for one in differences(config, before, sections) if not one.startswith(grown)]
    if text_settings.names_used_id(config, folder):
        differ = [one for one in differ if not one.startswith(f'--columns={ITEM_FILE_ID}')]
    if differ and not (folder / 'flags.cfg').is_file():
        if not has_data(Path(config.data.prepared)):
            raise no_data(config.data.prepared)
        raise UserError(
            f'--prepared={config.data.prepared} was prepared otherwise: {", ".join(differ)}; leave '
            'those flags out'
        )
    # Other values of a model's own settings follow from the model.
    differ = [one for one in differ if one.startswith('--model=')] or differ
    if differ:
        limits = tuple(f'--{name}=' for name in LIMITS)
        rule = (
            ' (limits of epochs may only grow, only while no later stage is trained, and not with '
            'a cosine)'
        )
        rule = rule if any(one.startswith(limits) for one in differ) else ''
        raise UserError(
            f'{folder} holds another run: {", ".join(differ)}{rule}; choose another --workdir, or '
            'leave those flags out'
        )


# Flags that end a training stage.
LIMITS = ('pretrain_epochs', 'finetune_epochs', 'patience')


def _grown_limits(config: Config, before: Config, folder: Path) -> list[str]:
    """Limits that are larger than the run's, where the run's last training stage can go on.

    A stage that another one was trained from ends where it ended then; patience is of all stages.
    """
    trained = [stage for stage in TRAINED if _has_checkpoints(folder, stage)]
    if not trained or trained[-1] not in config.run.stages:
        return []
    names = ['patience'] if len(trained) == 1 else []
    if before.training.schedule == 'constant':  # a cosine ends at the greatest number of epochs
        names.append(f'{trained[-1]}_epochs')
    new, old = config.training, before.training
    return [name for name in names if getattr(new, name) > getattr(old, name)]
