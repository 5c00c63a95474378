"""Checks of the settings of item texts at the start of a run, before anything is written.

The stage text, and a stage that starts from item vectors, would find the same mistakes after the
data are prepared.
"""

from collections.abc import Sequence
from pathlib import Path

from fame_jax import run_dir
from fame_jax.config import Config
from fame_jax.config import flags as config_flags
from fame_jax.data import download, names
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models.item_model import ItemModel
from fame_jax.stages.facet_names import facets_of_slices
from fame_jax.text import facets, item_files, item_init, vectors
from fame_jax.text.options import TextOptions

OF_PATH = (item_init.VECTORS, 'text.json')  # the files that --text_path needs


def check_texts(given: config_flags.Given, config: Config, model: ItemModel) -> None:
    """Checks what flags and folders say about item texts; no file of items is read.

    Args:
      given: the flags of the command; only its own --items has to be there.
      config: the settings of the run.
      model: the module of --model.

    Raises:
      UserError: when a file is missing, or a stage could not start.
    """
    folder, stages, text = Path(config.run.workdir), config.run.stages, config.text
    if given.values.get('items'):
        item_files.check_path(text.items, f'--items={text.items}')
    if 'text' in stages and not item_init.has_files(folder / 'text', files_of(config)):
        _check_stage(config, model)
    source = config.training.backbone
    stage = 'pretrain' if source == 'pretrain' else 'finetune'
    if stage not in stages or any((folder / 'checkpoints' / stage).glob('*')):
        return
    is_own = source in ('pretrain', 'scratch')
    before = stages[: stages.index(stage)] if is_own else ()
    run = folder if is_own else Path(source)
    if text.item_init == 'text' and is_own and 'text' not in before:
        if not item_init.has_files(run / 'text'):
            raise _no_vectors(f'--item_init={text.item_init}', 'item', config, stage)
    elif text.item_init not in ('random', 'text') and is_own:
        advice = 'check the path, or give random or text'
        with explain_os_errors(f'--item_init={text.item_init}', advice):
            Path(text.item_init).stat()
    if text.text_path and 'text' not in before and not item_init.has_files(run / 'text', OF_PATH):
        raise _no_vectors(f'--text_path={text.text_path:g}', 'text', config, stage)


def names_used_id(config: Config, folder: Path) -> bool:
    """Whether item_file_id of --columns names the field that the folder's stage text has used."""
    given, path = config.data.column_names.get('item_file_id'), folder / 'text' / 'text.json'
    if not given or not path.is_file():
        return False
    record = run_dir.read_json(path)
    card = record.get('card', {}) if isinstance(record, dict) else {}
    return names.join_words(given) == names.join_words(card.get('id_field', '')) != ''


def files_of(config: Config) -> tuple[str, ...]:
    """The files that the stage text of a run leaves in its folder text/."""
    has_heads, has_path = config.text.item_init == 'text', config.text.text_path > 0
    return (*item_init.FILES * has_heads, *OF_PATH * has_path)


def assign_facets(module: ItemModel, wanted: Sequence[str]) -> list[str]:
    """The facet of each slice of the item vectors that the stage text trains.

    Args:
      module: the model.
      wanted: names of facets.

    Raises:
      UserError: when there is none, or they do not fit the model's heads and width.
    """
    if not wanted:
        raise UserError(
            '--facets is empty; name a facet for each head, such as --facets=leaf_category,brand '
            'or --facets=genres'
        )
    heads = facets_of_slices(module, wanted)
    if module.width % len(heads):
        raise UserError(
            f'--width={module.width} is not a multiple of {len(heads)}, the number of heads or '
            'facets; change one of them'
        )
    return heads


def _check_stage(config: Config, model: ItemModel) -> None:
    """Checks what the stage text needs, as far as flags and names of files tell."""
    text, is_synthetic = config.text, config.data.dataset == 'synthetic'
    labels: list[str] = []
    if text.item_init == 'text':
        options = TextOptions.parse(text.text_options)
        if text.facets or not is_synthetic:  # synthetic data have facets of their own
            heads = assign_facets(model, text.facets)
            options.check_heads(heads)
            labels = [name for name in heads if name != facets.INSTANCE]
    vectors.check_encoder(text.text_encoder)
    if text.items:
        item_files.check_path(text.items, f'--items={text.items}')
    elif not is_synthetic and (labels or not text.text_encoder.endswith('.npy')):
        _check_own_items(config.data.dataset, config.data.data_dir)


def _check_own_items(dataset: str, data_dir: str) -> None:
    """Refuses a log without an item file next to it; that of a known data set may be downloaded."""
    places = (Path(dataset).expanduser(), Path(data_dir).expanduser() / dataset)
    if dataset not in download.KNOWN and any(path.is_file() for path in places):
        download.locate_items(dataset, data_dir)


def _no_vectors(flag: str, kind: str, config: Config, stage: str) -> UserError:
    """The error for a stage that starts from vectors which the stage text has not made."""
    source = config.training.backbone
    is_own = source in ('pretrain', 'scratch')
    folder = Path(config.run.workdir if is_own else source) / 'text'
    others = [name for name in config.run.stages if name != 'text']
    others.insert(others.index(stage), 'text')
    advice = f'add text before {stage}: --stages={",".join(others)}'
    return UserError(
        f'{flag} needs the {kind} vectors of the stage text, and {folder} has none; '
        + (advice if is_own else f'run --stages=text in {source} first')
    )
