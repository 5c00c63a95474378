"""What a stage writes while it trains: metrics.jsonl, the screen, TensorBoard, other trackers."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fame_jax.errors import explain_os_errors
from fame_jax.run_dir import Metrics
from fame_jax.screen import Screen, duration
from fame_jax.training.trackers import TRACKERS, Trackers

FLUSH_SECONDS = 10.0  # between two writes of TensorBoard events to the disk


class Log:
    """One stage's log, in several places."""

    def __init__(
        self,
        stage: str,
        metrics: Metrics,
        screen: Screen,
        events: 'Events | None' = None,
        trackers: Trackers | None = None,
    ):
        """Opens nothing.

        Args:
          stage: the name that lines and events carry.
          metrics: the run's metrics.jsonl.
          screen: the terminal.
          events: TensorBoard's file, or None.
          trackers: of --track, or None.
        """
        self.stage = stage
        self.metrics = metrics
        self.screen = screen
        self._events = events
        self._trackers = trackers

    def drop_after(self, epoch: int) -> None:
        """Drops lines of epochs that a resumed run is going to repeat."""
        self.metrics.keep(lambda line: line.get('stage') != self.stage or line['epoch'] <= epoch)

    def say(self, line: str) -> None:
        """Prints a line."""
        self.screen.say(f'{self.stage}: {line}')

    def values(self, split: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Adds a line to metrics.jsonl and the values to TensorBoard and the trackers."""
        self.metrics.append(stage=self.stage, step=step, epoch=epoch, split=split, **values)
        if self._events is not None and step:
            self._events.add(step, {f'{split}/{name}': value for name, value in values.items()})
        if self._trackers is not None:
            named = {f'{self.stage}/{split}/{name}': value for name, value in values.items()}
            self._trackers.log(step, named)

    def epoch_end(
        self,
        epoch: int,
        epochs: int,
        train: Mapping[str, float],
        validation: str,
        best: bool,
    ) -> None:
        """Prints an epoch's line in place of its progress bar; `validation` is of `summarise`."""
        compiling = train['compile_seconds']
        self.screen.end(
            f'{self.stage} {epoch}/{epochs}: loss {train["loss"]:.4f}, validation '
            f'{validation}{" (best)" if best else ""}, '
            f'{train["histories_per_second"]:,.0f} histories/s, {duration(train["seconds"])}'
            + (f', compiling {duration(compiling)}' if compiling else '')
        )


class Events:
    """A file of TensorBoard events.

    tensorboardX's SummaryWriter writes in a thread: on a full disk that thread ends and the run
    waits for it forever. Here a failure is raised.
    """

    def __init__(self, folder: Path):
        """Opens a new file in the folder.

        Raises:
          UserError: when it cannot be written.
        """
        # Imported here because it is slow to import.
        from tensorboardX.event_file_writer import EventsWriter

        self._doing = f'writing TensorBoard events in {folder}'
        with explain_os_errors(self._doing):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / 'events'))
        self._flushed = time.monotonic()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of a step; they are on the disk some seconds later."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with explain_os_errors(self._doing):
            for name, value in values.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._writer.write_event(event)
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        with explain_os_errors(self._doing):
            self._writer.close()


def summarise(values: Mapping[str, float], select_on: str = 'ndcg@20') -> str:
    """Validation metrics in one phrase, of the ranking by which the best epoch is selected."""
    prefix = select_on.removesuffix('ndcg@20')
    ranking = 'unmasked ' if prefix else ''
    return f'{ranking}NDCG@20 {values[select_on]:.4f} HR@10 {values[prefix + "hr@10"]:.4f}'


@contextlib.contextmanager
def open_log(
    stage: str,
    folder: Path,
    metrics: Metrics,
    screen: Screen,
    write: bool,
    track: Sequence[str] = ('tensorboard',),
    config: Mapping[str, Any] | None = None,
) -> Iterator[Log]:
    """A stage's log, with TensorBoard events in folder/tensorboard/STAGE.

    Args:
      stage: the stage's name.
      folder: the run's folder.
      metrics: the run's metrics.jsonl.
      screen: the terminal.
      write: whether this process writes events; of several processes only the first does.
      track: --track.
      config: the run's settings by flag name, for trackers.

    Raises:
      UserError: when the events cannot be written.
    """
    events, trackers = None, None
    with contextlib.ExitStack() as stack:
        if write and 'tensorboard' in track:
            with screen.waiting(f'{stage}: opening the TensorBoard events'):  # imports tensorboardX
                events = Events(folder / 'tensorboard' / stage)
            stack.callback(events.close)
        names = [name for name in track if name in TRACKERS]
        if write and names:
            with screen.waiting(f'{stage}: opening {" and ".join(names)}'):
                trackers = Trackers(names, folder, config or {}, screen.say)
            stack.callback(trackers.close)
        yield Log(stage, metrics, screen, events, trackers)
