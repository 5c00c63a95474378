"""MLflow and trackio, in addition to metrics.jsonl and TensorBoard: --track.

A workdir is one tracked run. Its id is in tracking.json, so that later stages and a resumed command
go on with the same run. A tracker that fails is left out from then on, and training goes on.
"""

import importlib
import importlib.util
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fame_jax import run_dir
from fame_jax.config.fields import show
from fame_jax.errors import UserError
from fame_jax.screen import one_line

FILE = 'tracking.json'
PROJECT = 'fame_jax'  # MLflow's experiment, unless MLFLOW_EXPERIMENT_NAME is set; trackio's project


class Mlflow:
    """MLflow's run of a workdir, in the store of MLFLOW_TRACKING_URI."""

    def __init__(self, name: str, stored: str, config: Mapping[str, str]):
        """Starts a run, or goes on with the stored one, which has its settings already."""
        self._mlflow = importlib.import_module('mlflow')
        self._mlflow.set_experiment(os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT))
        # Seeds that train together have a run each at the same time, which MLflow calls nested.
        if stored:
            run = self._mlflow.start_run(run_id=stored, nested=True)
        else:
            run = self._mlflow.start_run(run_name=name, nested=True)
        self.id = run.info.run_id
        if not stored:
            self._mlflow.log_params(config, run_id=self.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values of a step; MLflow allows no @ in a name."""
        allowed = {name.replace('@', '_at_'): value for name, value in values.items()}
        self._mlflow.log_metrics(allowed, step=step, run_id=self.id)

    def close(self) -> None:
        """Ends the run that was started last; runs are closed in the reverse order."""
        self._mlflow.end_run()


class Trackio:
    """Trackio's run of a workdir. A process has one at a time."""

    def __init__(self, name: str, stored: str, config: Mapping[str, str]):
        """Starts a run, or goes on with the stored one; the id is its name."""
        self._trackio = importlib.import_module('trackio')
        # Another workdir may have the same relative path.
        self.id = stored or f'{name} {uuid.uuid4().hex[:8]}'
        if stored:
            self._trackio.init(project=PROJECT, name=self.id, resume='allow')
        else:
            self._trackio.init(project=PROJECT, name=self.id, config=dict(config), resume='never')

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values of a step."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._trackio.finish()


TRACKERS = {'mlflow': Mlflow, 'trackio': Trackio}


def check(names: Sequence[str]) -> None:
    """Checks that the packages of the trackers are installed, without importing them.

    Raises:
      UserError: naming the extra that installs a missing one.
    """
    for name in names:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"--track={name}: {name} is not installed; pip install 'fame_jax[{name}]'"
            )


class Trackers:
    """The trackers of one stage of a run; none of their failures is raised."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        """Starts or resumes the run of each tracker.

        Args:
          names: of `TRACKERS`.
          folder: the run's, where tracking.json is.
          config: the run's settings by flag name, sent when a run starts.
          say: prints a line, about a tracker that fails.
        """
        self._say = say
        self._open: dict[str, Any] = {}
        texts = {flag: show(value) for flag, value in config.items() if value is not None}
        for name in names:
            self._guard(name, lambda name=name: self._start(name, folder, texts))

    def _start(self, name: str, folder: Path, config: Mapping[str, str]) -> None:
        path = folder / FILE
        stored = run_dir.read_json(path) if path.is_file() else {}
        stored = stored if isinstance(stored, dict) else {}
        begun = str(stored.get(name) or '')
        try:
            self._open[name] = TRACKERS[name](str(folder), begun, config)
        except Exception:
            if not begun:
                raise
            # The store has lost the run, or is another one.
            self._say(f'--track={name}: the run {one_line(begun, 80)} cannot be resumed; a new one')
            self._open[name] = TRACKERS[name](str(folder), '', config)
        if self._open[name].id != begun:
            run_dir.write_json(path, {**stored, name: self._open[name].id})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the finite values of a step to each tracker."""
        finite = {name: float(v) for name, v in values.items() if math.isfinite(v)}
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, finite))

    def close(self) -> None:
        """Ends the run of each tracker."""
        for name, tracker in reversed(list(self._open.items())):
            self._guard(name, tracker.close)
        self._open.clear()

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        """Does something; of a failure it says one line, and leaves the tracker out."""
        try:
            act()
        except Exception as error:  # of any library; the run is worth more than its copy elsewhere
            self._open.pop(name, None)
            reason = one_line(str(error) or type(error).__name__, 200)
            self._say(f'--track={name} failed ({reason}); training goes on without it')
