"""Exports with exact scores, and servers of them, for the tests of `serving/service`."""

import contextlib
import http.client
import json
import threading
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fame_jax.serving.recommender import Recommender, ServedModel, single_query

NUM_ITEMS = 60
IDS = ['', *(f'i{n}' for n in range(1, NUM_ITEMS + 1))]


def weighted_sum(params, tokens_BL, positions_BL, segments_BL):
    """One query: the sum of the items' vectors, each times its place in the history from 1 on."""
    weight_BL = (positions_BL + 1) * segments_BL
    return (params[tokens_BL] * weight_BL[:, :, None]).sum(axis=1)[:, None]


def make_exact(seed=0, ids=IDS, filter_seen=True):
    """A recommender whose vectors are whole numbers, so that scores are exact in any batch."""
    draw = np.random.default_rng(seed)
    params, item_VD = draw.integers(-20, 21, (2, len(ids), 4)).astype(np.float32)
    model = ServedModel(
        weighted_sum, single_query, jnp.asarray(params), jnp.asarray(item_VD), max_length=6
    )
    card = {'model': 'exact', 'seed': seed}
    titles = ['', *(f'title {n}' for n in range(1, len(ids)))]
    count_V = draw.permutation(len(ids))
    return Recommender(model, ids, count_V, titles, card, filter_seen=filter_seen)


class Served(NamedTuple):
    """A server that runs in a thread of this process, and the lines that it has said."""

    port: int
    service: Any
    said: list[str]

    def send(self, path, method='GET', body=None, headers=None):
        """Status, headers and body of an answer; the body parsed where it is JSON."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=20)
        with contextlib.closing(connection):
            headers = {} if headers is None else headers
            if method == 'POST':
                headers = {'Content-Type': 'application/json', **headers}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.headers['Content-Type'] == 'application/json' and content:
                content = json.loads(content)
            return answer.status, answer.headers, content

    def post(self, path, value, status=200):
        """The answer to a JSON value."""
        found, _, content = self.send(path, 'POST', json.dumps(value))
        assert found == status, content
        return content

    def metric(self, line):
        """The number of a sample of /metrics, named without `fame_jax_`; 0 where there is none."""
        _, _, text = self.send('/metrics')
        for sample in text.decode().splitlines():
            if sample.startswith(f'fame_jax_{line} '):
                return float(sample.rpartition(' ')[2])
        return 0.0


@contextlib.contextmanager
def serving(folder, token='', own_hosts=None, has_demo=False, **limits):
    """A server of an export or of a folder of exports."""
    from fame_jax.serving.service import command
    from fame_jax.serving.service.app import Service
    from fame_jax.serving.service.bodies import Limits
    from fame_jax.serving.service.versions import Versions

    said = []
    limits = Limits(**{'k': 20, 'seconds': 20.0, **limits})
    with command.listen('127.0.0.1', 0) as listener:
        port = listener.getsockname()[1]
        versions = Versions(folder, limits.k, has_demo, said.append)
        service = Service(versions, limits, token, own_hosts)
        server = command.make_server(service, quiet_seconds=0)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Served(port, service, said)
        finally:
            server.should_exit = True
            thread.join()
            service.close()
