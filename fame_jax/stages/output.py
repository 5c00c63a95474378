"""Where the stages that use a run write."""

import contextlib
from pathlib import Path

from fame_jax.config.serving import WRITERS
from fame_jax.data import download
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.stages.context import RunContext

ENDINGS = ('.json', '.jsonl', '.parquet', '.html', '.csv', '.txt')


def output_path(context: RunContext, name: str) -> Path:
    """The output of a stage: --out itself, or `name` in it, or `name` in the run's folder.

    A run that the output goes into is locked; of another one nothing is written.
    --out is the output itself where one such stage runs and the path is no folder: it has an ending
    such as .jsonl, or the output is a folder too. Otherwise it is a folder for the outputs.

    Raises:
      UserError: when there is no run, the folder cannot be made, several stages would write to one
        file, it is a file that the command reads, or its ending is not one of those written.
    """
    out = context.config.serving.out
    if not (context.folder / 'flags.cfg').is_file() and not context.is_prepared:
        raise UserError(
            f'{context.folder} holds no run; check --workdir, or run --stages=prepare first'
        )
    if not out:
        context.begin_writing()
        return context.folder / name
    path = Path(out)
    _refuse_inputs(context, path)
    several = sum(stage in WRITERS for stage in context.config.run.stages) > 1
    if several and path.suffix in ENDINGS:
        raise UserError(f'--out={out}: several stages write there; name a folder')
    is_folder = path.is_dir() or path.suffix not in ENDINGS
    if is_folder and '.' in name and path.suffix[1:].isalpha() and not path.exists():
        raise UserError(
            f'--out={out}: files end in {", ".join(ENDINGS)}; choose one of them, or make a folder '
            'of that name first'
        )
    path = path / name if several or (is_folder and '.' in name) else path
    with explain_os_errors(f'--out={out}: making {path.parent}', 'choose another --out'):
        if path.resolve().is_relative_to(context.folder.resolve()):
            context.begin_writing()
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _refuse_inputs(context: RunContext, path: Path) -> None:
    """Refuses an output in the place of a file that the command, or the run it uses, reads."""
    serving, data, items = (getattr(context.config, name) for name in ('serving', 'data', 'text'))
    inputs = [
        *((f'--{n}', getattr(serving, n)) for n in ('histories', 'allow_items', 'deny_items')),
        *(('--append', context.config.update.append), ('--items', items.items)),
        *(("the run's log", folder / data.dataset) for folder in (Path(), Path(data.data_dir))),
    ]
    with contextlib.suppress(UserError):  # where there is none
        inputs.append(("the run's items", download.locate_items(data.dataset, data.data_dir)))
    for what, given in inputs:
        with contextlib.suppress(OSError):  # a name and no file
            if given and path.is_file() and path.samefile(given):
                raise UserError(f'--out={path} is the file of {what}; write to another')
