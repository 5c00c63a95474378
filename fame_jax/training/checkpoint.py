"""Checkpoints of a stage; the only file that uses Orbax.

A stage has one folder, with a sub-folder for the newest step that holds four items:

    params      the parameters at that step
    optimizer   the optimizer's state
    best        the parameters of the best epoch so far, which are evaluated and served
    progress    JSON: step, epoch, early stopping, random key, Grain's state

Orbax writes into a temporary folder and renames it when it is complete, so a kill leaves the
checkpoint before. A restored array gets the sharding of the tree that it is restored into, or this
process's first device where that tree names none; the sharding it was saved with does not matter.
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
from fame_jax.parallel.mesh import TABLES

# Orbax logs each step of its work, and each failure with a traceback; failures are raised too.
for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)

Tree = Any

DAMAGED = 'it is damaged, or of another model'


class Checkpoints:
    """The checkpoints of one stage; a context manager."""

    def __init__(self, folder: Path):
        """Opens a stage's folder; makes it if it does not exist.

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
        """Closes Orbax's manager."""
        self._manager.close()

    def tidy(self) -> None:
        """Removes temporary folders of killed saves; only the process that saves here calls it."""
        for path in self.folder.glob('*.orbax-checkpoint-tmp*'):
            shutil.rmtree(path, ignore_errors=True)

    def last_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Tree, optimizer: Tree, best: Tree, progress: dict) -> None:
        """Writes a checkpoint, then removes the one before.

        Raises:
          UserError: when the disk refuses; the checkpoint before then still exists.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            best=ocp.args.StandardSave(best),
            progress=ocp.args.JsonSave(progress),
        )
        with _explain(f'saving a checkpoint in {self.folder}'), _without_late_tracebacks():
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()

    def progress(self) -> dict:
        """The progress of the newest checkpoint; empty if there is no checkpoint."""
        step = self.last_step()
        if step is None:
            return {}
        with _explain(f'reading the checkpoint {self.folder / str(step)}', DAMAGED):
            items = ocp.args.Composite(progress=ocp.args.JsonRestore())
            progress = self._manager.restore(step, args=items)['progress']
            if not isinstance(progress, dict):
                raise ValueError('its progress is no JSON object')
            return progress

    def restore(self, **trees: Tree) -> dict[str, Tree]:
        """Restores items of the newest checkpoint.

        Args:
          **trees: item -> a tree with the shapes, dtypes and shardings to restore into.

        Raises:
          UserError: when there is no checkpoint, or its trees are other ones.
        """
        step = self.last_step()
        if step is None:
            raise UserError(f'{self.folder} holds no checkpoint; run the stage that makes it first')
        with _explain(f'reading the checkpoint {self.folder / str(step)}', DAMAGED):
            items = ocp.args.Composite(
                **{name: self._restore_args(step, name, tree) for name, tree in trees.items()}
            )
            return dict(self._manager.restore(step, args=items))

    def _restore_args(self, step: int, name: str, tree: Tree) -> ocp.args.StandardRestore:
        """Restore arguments of one item; item tables may differ in padding rows.

        The number of padding rows depends on the devices that share a table.
        """
        folder = self.folder / str(step) / name
        if not folder.is_dir():
            raise ValueError(f'it has no {name}')
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
    """Turns Orbax's errors into a UserError.

    A full disk, a damaged file and a tree of another model come as a dozen exception types, so
    that their messages have to be read (of Orbax 0.12; the tests fill a disk and damage files).
    """
    try:
        with explain_os_errors(doing, advice):
            yield
    except UserError:
        raise
    except Exception as error:
        what = ' '.join(str(error).split())
        if not advice and 'rror writing' not in what and 'No space left' not in what:
            raise  # saving failed, but not because of the disk: a bug
        if any(phrase in what for phrase in ('No space left', 'ENOSPC', 'quota exceeded')):
            what = 'No space left on device'
            advice = 'free some space there and run the same command again'
        raise UserError(f'{doing}: {what[:300]}' + (f'; {advice}' if advice else '')) from error


@contextlib.contextmanager
def _without_late_tracebacks() -> Iterator[None]:
    """Hides tracebacks of the writes that were pending when another write failed.

    They report to Orbax's event loop, which the first failure has closed. That failure is raised.
    """
    original = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if 'Event loop is closed' not in str(unraisable.exc_value):
            original(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = original  # not after a failure: the tracebacks come late
