"""A trace of a few dispatches of each stage, for XProf, TensorBoard or ui.perfetto.dev."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from fame_jax.errors import explain_os_errors

FIRST, COUNT = 2, 8  # dispatches: the first one finds caches cold


class Profile:
    """Traces some of the dispatches of each stage; without a folder it does nothing."""

    def __init__(self, folder: str):
        """folder: where each stage gets a folder of its own; '' for no trace."""
        self.folder = folder
        self._stage = ''
        self._seen = 0
        self._tracing = False

    @contextlib.contextmanager
    def dispatch(self, stage: str) -> Iterator[list[Any]]:
        """Around one dispatch; its result, put in the list, is waited for before a trace ends."""
        if not self.folder:
            yield []
            return
        if stage != self._stage:
            self.close()
            self._stage, self._seen = stage, 0
        self._seen += 1
        if self._seen == FIRST:
            self._begin(Path(self.folder) / stage)
        result: list[Any] = []
        with jax.profiler.StepTraceAnnotation(stage, step_num=self._seen):
            yield result
        if self._seen == FIRST + COUNT - 1:
            jax.block_until_ready(result)
            self.close()

    def _begin(self, folder: Path) -> None:
        with explain_os_errors(f'writing the profile {folder}', 'choose another --profile'):
            folder.mkdir(parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # half a million calls would hide the device's work
            jax.profiler.start_trace(
                str(folder), create_perfetto_trace=True, profiler_options=options
            )
        self._tracing = True

    def close(self) -> None:
        """Ends a trace that is still going on, as where an epoch had fewer dispatches."""
        if self._tracing:
            self._tracing = False
            with explain_os_errors(f'writing the profile {self.folder}'):
                jax.profiler.stop_trace()
