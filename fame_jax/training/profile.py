"""A trace of a few dispatches of each stage, for XProf, TensorBoard or ui.perfetto.dev."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from fame_jax.errors import explain_os_errors

FIRST, COUNT = 2, 8  # dispatches; the first one of a stage runs with cold caches


class Profile:
    """Traces some dispatches of each stage; without a folder it does nothing."""

    def __init__(self, folder: str):
        """Traces nothing yet; each stage gets a sub-folder of `folder`, and '' means no trace."""
        self.folder = folder
        self._stage = ''
        self._seen = 0
        self._tracing = False

    @contextlib.contextmanager
    def dispatch(self, stage: str) -> Iterator[list[Any]]:
        """Surrounds one dispatch; a trace ends after the results put in the list are ready."""
        if not self.folder:
            yield []
            return
        if stage != self._stage:
            self.close()
            self._stage, self._seen = stage, 0
        self._seen += 1
        if self._seen == FIRST:
            self._start(Path(self.folder) / stage)
        result: list[Any] = []
        with jax.profiler.StepTraceAnnotation(stage, step_num=self._seen):
            yield result
        if self._seen == FIRST + COUNT - 1:
            jax.block_until_ready(result)
            self.close()

    def _start(self, folder: Path) -> None:
        with explain_os_errors(f'writing the profile {folder}', 'choose another --profile'):
            folder.mkdir(parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would hide the device's work
            jax.profiler.start_trace(
                str(folder), create_perfetto_trace=True, profiler_options=options
            )
        self._tracing = True

    def close(self) -> None:
        """Ends a trace that is still open, as after an epoch of few dispatches."""
        if self._tracing:
            self._tracing = False
            with explain_os_errors(f'writing the profile {self.folder}'):
                jax.profiler.stop_trace()
