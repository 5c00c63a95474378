"""Orbax, in one place: this file alone knows which of its interfaces is in use.

A stage has one folder of checkpoints, a sub-folder a step. Each holds, apart from one another:

    params      the parameters at that step
    optimizer   the optimizer's state
    best        the parameters of the best epoch so far; what is judged
    progress    JSON: step, epoch, early stopping, random key, Grain's state

Orbax writes into a temporary folder and renames it when it is whole, so a kill leaves the one
before. Restoring gives every array the sharding of the tree it is restored into, or this process's
first device where that has none: what was saved on another machine does not matter.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fame_jax.errors import UserError, explain_os_errors
from fame_jax.sharding import TABLES

# Orbax tells each step of its work, and each failure with a traceback; what fails is raised too.
for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)

Tree = Any

DAMAGED = 'it is damaged, or of another model'


class Checkpoints:
    """The checkpoints of one stage; a context manager."""

    def __init__(self, folder: Path):
        """Opens a stage's folder, and makes it when it is not there.

        Raises:
          UserError: when it cannot be made.
        """
        self.folder = folder.absolute()
        with explain_os_errors(f'making {folder}'):
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1, enable_async_checkpointing=False, create=False
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()

    def tidy(self) -> None:
        """Removes what kills left half-written; for the process that is going to save here."""
        for path in self.folder.glob('*.orbax-checkpoint-tmp*'):
            shutil.rmtree(path, ignore_errors=True)

    def last_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, params: Tree, optimizer: Tree, best: Tree, progress: dict) -> None:
        """Writes a checkpoint; the one before goes when this one is whole.

        Raises:
          UserError: when the disk refuses; the checkpoint before is then still there.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            best=ocp.args.StandardSave(best),
            progress=ocp.args.JsonSave(progress),
        )
        with _explain(f'saving a checkpoint in {self.folder}'), _without_echoes():
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()

    def progress(self) -> dict:
        """The progress of the newest checkpoint; empty when there is none."""
        step = self.last_step()
        if step is None:
            return {}
        with _explain(f'reading the checkpoint {self.folder / str(step)}', DAMAGED):
            items = ocp.args.Composite(progress=ocp.args.JsonRestore())
            return self._manager.restore(step, args=items)['progress']

    def restore(self, **trees: Tree) -> dict[str, Tree]:
        """Restores items of the newest checkpoint, each like the tree of arrays it is given.

        Raises:
          UserError: when there is none, or it does not hold such trees.
        """
        step = self.last_step()
        if step is None:
            raise UserError(f'{self.folder} holds no checkpoint; run the stage that makes it first')
        with _explain(f'reading the checkpoint {self.folder / str(step)}', DAMAGED):
            items = ocp.args.Composite(
                **{name: self._wanted(step, name, tree) for name, tree in trees.items()}
            )
            return dict(self._manager.restore(step, args=items))

    def _wanted(self, step: int, name: str, tree: Tree) -> ocp.args.StandardRestore:
        """A tree as it was saved, but for rows of item tables that are nobody's item.

        How many of those there are goes by the devices that share a table.
        """
        folder = self.folder / str(step) / name
        if not folder.is_dir():
            raise ValueError(f'there is no {name} in it')
        with ocp.StandardCheckpointer() as reader:
            stored = _shapes(reader.metadata(folder).item_metadata.tree)
        allowed = [
            path.split('/')[-1] in TABLES and stored[path][1:] == shape[1:]
            for path, shape in _shapes(tree).items()
            if stored.get(path, shape) != shape
        ]
        padded = bool(allowed) and all(allowed)
        return ocp.args.StandardRestore(_abstract(tree), strict=not padded)


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _abstract(tree: Tree) -> Tree:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, 'sharding', None) or here
        ),
        tree,
    )


@contextlib.contextmanager
def _explain(doing: str, advice: str = '') -> Iterator[None]:
    """Orbax tells of a full disk, a damaged file or another tree in a dozen exception types."""
    try:
        with explain_os_errors(doing, advice):
            yield
    except UserError:
        raise
    except Exception as error:
        what = ' '.join(str(error).split())
        if not advice and 'rror writing' not in what and 'No space left' not in what:
            raise  # saving: not the disk's refusal, so a fault of the program
        if any(sign in what for sign in ('No space left', 'ENOSPC', 'quota exceeded')):
            what = 'No space left on device'
            advice = 'free some space there and run the same command again'
        raise UserError(f'{doing}: {what[:300]}' + (f'; {advice}' if advice else '')) from error


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Keeps the writes that were under way when one failed from telling it with a traceback each.

    They report to Orbax's event loop, which the first failure has closed; the failure is raised.
    """
    told = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if 'Event loop is closed' not in str(unraisable.exc_value):
            told(unraisable)

    sys.unraisablehook = tell
    yield
    sys.unraisablehook = told  # not after a failure: the echoes come late
