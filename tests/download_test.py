"""Known data sets: looked for in order, fetched with their checksum, or told where to get them."""

import hashlib
import http.server
import re
import threading

import pytest

from fame_jax.data import download
from fame_jax.data.download import ITEMS, KNOWN, Known, locate, locate_items
from fame_jax.errors import UserError

CONTENT = b'1 2 3 4\n'


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Three folders, and a cache that is not the user's; no address is reachable."""
    monkeypatch.setattr(download.pooch, 'os_cache', lambda name: tmp_path / 'cache' / name)
    monkeypatch.setenv('FAME_JAX_DATA', str(tmp_path / 'env'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    return tmp_path


@pytest.fixture
def server(world, monkeypatch):
    """Serves CONTENT at any address; makes 'toys' point to it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if 'toys' in self.path else 404)
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as site:
        threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()

        def offer(path, sha256):
            url = f'http://127.0.0.1:{site.server_port}/{path}'
            monkeypatch.setitem(KNOWN, 'toys', KNOWN['toys']._replace(url=url, sha256=sha256))

        yield offer
        site.shutdown()


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    return path


def test_the_named_folder_then_the_variable_then_the_cache(world):
    named = str(world / 'named')
    for folder in ('cache/fame_jax', 'env', 'named'):
        path = put(world / folder / 'amazon' / 'Toys_and_Games.txt')
        assert locate('toys', named) == path


@pytest.mark.parametrize(
    'name, place',
    [
        ('toys', 'Toys_and_Games.txt'),
        ('beauty', 'amazon/Beauty.txt'),
        ('scientific', 'amazon-scientific/Scientific.txt'),
        ('ml-1m', 'ml-1m/ratings.dat'),
        ('ml-1m', 'ml-1m/ml-1m.txt.gz'),
        ('ml-1m', 'ml-1m.zip'),
        ('ml-100k', 'ml-100k/u.data'),
        ('ml-100k', 'ml-100k/ml-100k.inter'),
        ('ml-20m', 'ml-20m/ratings.csv'),
        ('ml-20m', 'ml-20m.zip'),
    ],
)
def test_known_places_are_found(world, name, place):
    path = put(world / 'env' / place)
    assert locate(name) == path


def test_the_original_log_comes_before_a_filtered_one(world):
    put(world / 'env' / 'ml-1m' / 'ml-1m.txt.gz')
    path = put(world / 'env' / 'ml-1m' / 'ratings.dat')
    assert locate('ml-1m') == path


def test_a_download_goes_to_the_cache_once(world, server):
    server('toys.txt', hashlib.sha256(CONTENT).hexdigest())
    path = locate('toys', str(world / 'named'))
    assert path == world / 'cache' / 'fame_jax' / 'amazon' / 'Toys_and_Games.txt'
    assert path.read_bytes() == CONTENT
    server('gone.txt', '0' * 64)
    assert locate('toys', str(world / 'named')) == path


@pytest.mark.parametrize('path, said', [('toys.txt', 'not the expected'), ('gone', 'failed')])
def test_a_bad_download_is_told_and_leaves_nothing(world, server, path, said):
    server(path, '0' * 64)
    with pytest.raises(UserError, match=said) as caught:
        locate('toys')
    assert '\n' not in str(caught.value)
    assert not [p for p in (world / 'cache').rglob('*') if p.is_file()]


def test_no_network_names_file_address_and_folder(world, monkeypatch):
    url = 'http://127.0.0.1:9/Toys_and_Games.txt'
    monkeypatch.setitem(KNOWN, 'toys', KNOWN['toys']._replace(url=url))
    with pytest.raises(UserError) as caught:
        locate('toys', str(world / 'named'))
    message = str(caught.value)
    assert "'toys'" in message and url in message and '\n' not in message
    assert str(world / 'named' / 'amazon' / 'Toys_and_Games.txt') in message


def test_without_an_address_the_error_says_where_the_file_belongs(world):
    with pytest.raises(UserError, match='no address') as caught:
        locate('scientific')
    assert str(world / 'env' / 'amazon-scientific' / 'Scientific.txt') in str(caught.value)


@pytest.mark.parametrize('name', sorted(set(KNOWN) - {'scientific'}))
def test_addresses_are_pinned(name):
    known: Known = KNOWN[name]
    assert re.fullmatch('[0-9a-f]{64}', known.sha256)
    assert known.url.startswith('https://') and known.home in known.places
    assert 'grouplens.org' in known.url or re.search('/[0-9a-f]{40}/', known.url)


@pytest.mark.parametrize(
    'name, place',
    [
        ('toys', 'amazon/Toys_and_Games_items.jsonl.gz'),
        ('beauty', 'Beauty_items.jsonl'),
        ('scientific', 'amazon-scientific/Scientific_items.jsonl.gz'),
        ('ml-1m', 'ml-1m/ml-1m_items.jsonl.gz'),
        ('ml-20m', 'ml-20m_items.csv'),
    ],
)
def test_items_of_known_data_are_found(world, name, place):
    path = put(world / 'env' / place)
    assert locate_items(name) == path
    better = put(world / 'named' / place)
    assert locate_items(name, str(world / 'named')) == better


@pytest.mark.parametrize(
    'name, log, items',
    [
        ('ml-1m', 'ml-1m/ratings.dat', 'ml-1m/movies.dat'),
        ('ml-1m', 'ml-1m/ml-1m.inter', 'ml-1m/ml-1m.item'),
        ('ml-1m', 'ml-1m.zip', 'ml-1m.zip'),
        ('ml-100k', 'ml-100k/u.data', 'ml-100k/u.item'),
        ('ml-100k', 'ml-100k/ml-100k.inter', 'ml-100k/ml-100k.item'),
        ('ml-20m', 'ml-20m/ratings.csv', 'ml-20m/movies.csv'),
    ],
)
def test_what_came_with_the_original_log_is_found(world, name, log, items):
    put(world / 'env' / log)
    path = put(world / 'env' / items)
    assert locate_items(name) == path


def test_original_items_are_not_laid_beside_a_renumbered_log(world):
    """The ids of ml-1m.txt are its own: the original movies would be matched wrongly."""
    put(world / 'env' / 'ml-1m' / 'ml-1m.txt.gz')
    for place in ('env/ml-1m/movies.dat', 'cache/fame_jax/ml-1m.zip'):
        put(world / place)
    with pytest.raises(UserError, match="describes the items of data set 'ml-1m'"):
        locate_items('ml-1m')


@pytest.mark.parametrize('name', sorted(KNOWN))
def test_missing_items_say_where_they_belong(world, name):
    with pytest.raises(UserError, match='--items') as caught:
        locate_items(name, str(world / 'named'))
    assert str(world / 'named' / f'{ITEMS[name][0]}.jsonl.gz') in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'log, items',
    [
        ('my.txt', 'my_items.jsonl.gz'),
        ('my.txt.gz', 'my_items.jsonl'),
        ('my.log.csv', 'my.log_items.csv'),
        ('my.inter', 'my.item'),
        ('ratings.dat', 'movies.dat'),
        ('my.zip', 'my.zip'),
    ],
)
def test_items_beside_a_log_are_found(world, log, items):
    path = put(world / 'here' / log)
    found = put(world / 'here' / items)
    assert locate_items(str(path)) == locate_items(path) == found
    assert locate_items(log, str(world / 'here')) == found


def test_a_log_alone_is_told(world):
    path = put(world / 'here' / 'my.txt')
    put(world / 'here' / 'my.item')
    with pytest.raises(UserError, match=r'my_items\.jsonl\.gz, or name one with --items') as caught:
        locate_items(path)
    assert str(caught.value).startswith(f'{path}: ')
