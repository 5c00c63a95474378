"""Counts and durations of the server in the text format of Prometheus, version 0.0.4."""

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)

Labels = dict[str, str]


class Histogram:
    """Counts of values up to each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.count_by_bound = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self.count_by_bound[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: Labels) -> Iterable[str]:
        """The samples NAME_bucket, NAME_sum and NAME_count."""
        count = 0
        for bound, here in zip([*map(str, self.bounds), '+Inf'], self.count_by_bound):
            count += here
            yield sample(f'{name}_bucket', count, {**labels, 'le': bound})
        yield sample(f'{name}_sum', self.total, labels)
        yield sample(f'{name}_count', count, labels)


class Metrics:
    """All counts of a server. Methods are called in the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.batches = Histogram(SIZES)
        self.in_flight = 0

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer; `route` is one of the server's, or 'other'."""
        self.requests[route, status] += 1
        self.seconds.setdefault(route, Histogram(SECONDS)).add(seconds)

    def text(self, waiting: int, version: Labels, loaded: int, refused: int) -> str:
        """The text of /metrics.

        Args:
          waiting: histories that wait for the device.
          version: name and digest of the export that is served.
          loaded: exports that were loaded since the start, the first one among them.
          refused: exports that were found incomplete or damaged.
        """
        out = [
            *_head('requests_total', 'counter', 'Answers by route and HTTP status.'),
            *(
                sample('requests_total', count, {'route': route, 'status': str(status)})
                for (route, status), count in sorted(self.requests.items())
            ),
            *_head('request_seconds', 'histogram', 'Seconds from head to answer, by route.'),
        ]
        for route, histogram in sorted(self.seconds.items()):
            out += histogram.lines('request_seconds', {'route': route})
        out += _head('batch_histories', 'histogram', 'Histories that the device scored together.')
        out += self.batches.lines('batch_histories', {})
        for name, kind, value, about in (
            ('in_flight', 'gauge', self.in_flight, 'Requests without an answer yet.'),
            ('waiting_histories', 'gauge', waiting, 'Histories that wait for the device.'),
            ('versions_loaded_total', 'counter', loaded, 'Exports loaded since the start.'),
            ('versions_refused_total', 'counter', refused, 'Exports incomplete or damaged.'),
        ):
            out += [*_head(name, kind, about), sample(name, value, {})]
        out += _head('version_info', 'gauge', 'The export that is served.')
        out += [sample('version_info', 1, version)]
        return '\n'.join(out) + '\n'


def sample(name: str, value: float, labels: Labels) -> str:
    """One line: fame_jax_NAME{label="value"} number."""
    inside = ','.join(f'{key}="{escape(text)}"' for key, text in labels.items())
    return f'fame_jax_{name}{{{inside}}} {value}' if inside else f'fame_jax_{name} {value}'


def escape(text: str) -> str:
    """A label's value as it stands between quotes."""
    text = text.encode(errors='replace').decode()
    return text.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f'# HELP fame_jax_{name} {about}', f'# TYPE fame_jax_{name} {kind}']
