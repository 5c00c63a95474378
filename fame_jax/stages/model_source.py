"""The source of a model class from outside this package, kept with the run it trained."""

import inspect

from fame_jax import run_dir
from fame_jax.errors import UserError
from fame_jax.models.item_model import ItemModel
from fame_jax.parallel import processes
from fame_jax.stages.context import RunContext

FILE = 'model_source.py'


def read_source(kind: type[ItemModel]) -> str:
    """The source of a class and its bases outside this package; '' if all are in it.

    Functions that the class calls are not part of it.
    """
    parts = []
    for cls in kind.__mro__:
        if issubclass(cls, ItemModel) and not cls.__module__.startswith('fame_jax.'):
            try:
                parts.append(inspect.getsource(cls))
            except (OSError, TypeError):  # defined where Python keeps no source
                continue
    return '\n\n'.join(parts)


def check_source(context: RunContext) -> None:
    """Compares the model's source with that of the run, or keeps it if nothing is trained yet.

    Raises:
      UserError: when the class has changed since it was trained.
    """
    path, source = context.folder / FILE, read_source(type(context.model))
    trained = any((context.folder / 'checkpoints').glob('*/[0-9]*'))
    if trained and path.is_file() and path.read_text(encoding='utf-8') != source:
        raise UserError(
            f'{context.config.model.model} has changed since {context.folder} was trained ({path} '
            'has the former code); choose another --workdir'
        )
    if source and not trained and processes.is_chief():
        run_dir.write_text(path, source)
