"""Known data sets: the order of search, downloads with their checksum, and error messages."""

import hashlib
import http.server
import io
import re
import threading
import zipfile

import pytest

from fame_jax.data import download
from fame_jax.data.download import ITEMS, KNOWN, Known, locate, locate_items
from fame_jax.data.prepare import prepare
from fame_jax.errors import UserError

CONTENT = b'1 2 3 4\n'


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Data folders below tmp_path, its cache in place of the user's."""
    monkeypatch.setattr(download.pooch, 'os_cache', lambda name: tmp_path / 'cache' / name)
    monkeypatch.setenv('FAME_JAX_DATA', str(tmp_path / 'env'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    return tmp_path


@pytest.fixture
def server(folders, monkeypatch):
    """A function that makes 'toys' point to a local server of CONTENT."""

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


def test_the_named_folder_then_the_variable_then_the_cache(folders):
    named = str(folders / 'named')
    for folder in ('cache/fame_jax', 'env', 'named'):
        path = put(folders / folder / 'amazon' / 'Toys_and_Games.txt')
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
        ('ml-1m-full', 'ml-1m-full/ml-1m-full.txt.gz'),
        ('lastfm', 'lastfm/LastFM.txt.gz'),
        ('foursquare', 'Foursquare.txt.gz'),
        ('toys-2014', 'Amazon2014Toys.zip'),
        ('h-and-m', 'transactions_train.csv'),
    ],
)
def test_known_places_are_searched(folders, name, place):
    path = put(folders / 'env' / place)
    assert locate(name) == path


def test_the_original_log_comes_before_a_filtered_one(folders):
    put(folders / 'env' / 'ml-1m' / 'ml-1m.txt.gz')
    path = put(folders / 'env' / 'ml-1m' / 'ratings.dat')
    assert locate('ml-1m') == path


def test_a_download_goes_to_the_cache_once(folders, server):
    server('toys.txt', hashlib.sha256(CONTENT).hexdigest())
    path = locate('toys', str(folders / 'named'))
    assert path == folders / 'cache' / 'fame_jax' / 'amazon' / 'Toys_and_Games.txt'
    assert path.read_bytes() == CONTENT
    server('gone.txt', '0' * 64)
    assert locate('toys', str(folders / 'named')) == path


@pytest.mark.parametrize('path, message', [('toys.txt', 'wrong checksum'), ('gone', 'failed')])
def test_a_bad_download_is_an_error_and_leaves_no_file(folders, server, path, message):
    server(path, '0' * 64)
    with pytest.raises(UserError, match=message) as caught:
        locate('toys')
    assert '\n' not in str(caught.value)
    assert not [p for p in (folders / 'cache').rglob('*') if p.is_file()]


def test_no_network_names_file_address_and_folder(folders, monkeypatch):
    url = 'http://127.0.0.1:9/Toys_and_Games.txt'
    monkeypatch.setitem(KNOWN, 'toys', KNOWN['toys']._replace(url=url))
    with pytest.raises(UserError) as caught:
        locate('toys', str(folders / 'named'))
    message = str(caught.value)
    assert "'toys'" in message and url in message and '\n' not in message
    assert str(folders / 'named' / 'amazon' / 'Toys_and_Games.txt') in message


def test_without_an_address_the_error_says_where_the_file_belongs(folders):
    with pytest.raises(UserError, match='no known address') as caught:
        locate('scientific')
    assert str(folders / 'env' / 'amazon-scientific' / 'Scientific.txt') in str(caught.value)


@pytest.mark.parametrize('name', sorted(KNOWN))
def test_addresses_are_pinned(name):
    known: Known = KNOWN[name]
    assert known.home in known.places and len(set(known.places)) == len(known.places)
    assert bool(known.url) == bool(known.sha256)
    assert known.url or known.page.startswith('https://') or name == 'scientific'
    if known.url:
        assert re.fullmatch('[0-9a-f]{64}', known.sha256)
        assert re.search(
            r'^https://.*(grouplens\.org|/[0-9a-f]{40}/|zenodo\.org/records/\d+/)', known.url
        )


@pytest.mark.parametrize('name', [name for name in sorted(KNOWN) if KNOWN[name].page])
def test_without_a_checksum_the_error_names_the_page_and_the_place(folders, name):
    if KNOWN[name].url:
        return
    with pytest.raises(UserError, match='is not downloaded; get ') as caught:
        locate(name, str(folders / 'named'))
    message = str(caught.value)
    assert KNOWN[name].page in message and '\n' not in message
    assert message.endswith(f'put it at {folders / "named" / KNOWN[name].home}')


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, text in files.items():
            archive.writestr(f'Amazon2014Beauty/{name}', text)
    return file.getvalue()


def test_a_zip_of_a_log_is_downloaded_and_prepared(folders, server, monkeypatch):
    """The form of the Zenodo records: .inter with times, .item with titles."""
    log = 'USER\tITEM\tRATING\tTIMESTAMP\n' + ''.join(
        f'u{n % 2}\ti{n}\t5\t{1_400_000_000 - n}\n' for n in range(8)
    )
    content = zipped(**{'Beauty.inter': log, 'Beauty.item': 'ITEM\tTITLE\ni0\tSoap\n'})
    monkeypatch.setitem(globals(), 'CONTENT', content)
    server('toys.zip', hashlib.sha256(content).hexdigest())
    known = KNOWN['toys']
    monkeypatch.setitem(
        KNOWN, 'beauty-2014', KNOWN['beauty-2014']._replace(url=known.url, sha256=known.sha256)
    )
    data = prepare('beauty-2014', k_core=0)
    assert dict(data.histories()) == {
        'u0': ['i6', 'i4', 'i2', 'i0'], 'u1': ['i7', 'i5', 'i3', 'i1'],
    }  # fmt: skip
    assert data.card['time']['first'] == '2014-05-13'


def rows(header, line):
    return header + ''.join(line.replace('#', str(n)) for n in (3, 2, 1))


# The last action is on the first line.
LOGS = {
    'retailrocket': (
        'retailrocket/events.csv',
        rows('timestamp,visitorid,event,itemid,transactionid\n', '143322133211#,7,view,#,\n'),
    ),
    'diginetica': (
        'diginetica/train-item-views.csv',
        rows('sessionId;userId;itemId;timeframe;eventdate\n', '9;NA;#;#00;2016-05-09\n'),
    ),
    'h-and-m': (
        'h-and-m/transactions_train.csv',
        rows('t_dat,customer_id,article_id,price,sales_channel_id\n', '2018-09-2#,c,#,0.05,2\n'),
    ),
    'yelp': (
        'yelp/yelp_academic_dataset_review.json',
        rows(
            '',
            '{"review_id": "r#", "user_id": "u", "business_id": "#", "stars": 4.0, "useful": 0, '
            '"text": "good", "date": "2018-07-07 22:09:1#"}\n',
        ),
    ),
    'lastfm': ('lastfm/LastFM.txt', 'u 1 2 3\n'),
    'foursquare': ('Foursquare.txt', 'u 1 2 3\n'),
    'ml-1m-full': ('ml-1m-full/ml-1m-full.txt', 'u 1 2 3\n'),
}


@pytest.mark.parametrize('name', LOGS)
def test_known_logs_are_read_by_their_own_columns(folders, name):
    place, text = LOGS[name]
    put(folders / 'env' / place).write_text(text)
    ((_, items),) = prepare(name, k_core=0).histories()
    assert items == ['1', '2', '3']


def test_given_columns_go_before_those_of_a_known_log(folders):
    place, text = LOGS['diginetica']
    put(folders / 'env' / place).write_text(text)
    card = prepare('diginetica', k_core=0, columns={'time': '-', 'user': 'userId'}).card
    assert card['columns'] == {'user': 'userId', 'item': 'itemId'}


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
def test_item_files_of_known_data_are_found(folders, name, place):
    path = put(folders / 'env' / place)
    assert locate_items(name) == path
    better = put(folders / 'named' / place)
    assert locate_items(name, str(folders / 'named')) == better


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
def test_item_files_published_with_a_log_are_found(folders, name, log, items):
    put(folders / 'env' / log)
    path = put(folders / 'env' / items)
    assert locate_items(name) == path


def test_published_items_are_not_used_for_a_renumbered_log(folders):
    """ml-1m.txt has ids of its own: the published movies would be matched wrongly."""
    put(folders / 'env' / 'ml-1m' / 'ml-1m.txt.gz')
    for place in ('env/ml-1m/movies.dat', 'cache/fame_jax/ml-1m.zip'):
        put(folders / place)
    with pytest.raises(UserError, match="data set 'ml-1m' has no item file"):
        locate_items('ml-1m')


@pytest.mark.parametrize('name', sorted(KNOWN))
def test_a_missing_item_file_is_an_error_with_its_place(folders, name):
    with pytest.raises(UserError, match='--items') as caught:
        locate_items(name, str(folders / 'named'))
    assert str(folders / 'named' / f'{ITEMS[name][0]}.jsonl.gz') in str(caught.value)
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
def test_item_files_in_the_folder_of_a_log_are_found(folders, log, items):
    path = put(folders / 'here' / log)
    found = put(folders / 'here' / items)
    assert locate_items(str(path)) == locate_items(path) == found
    assert locate_items(log, str(folders / 'here')) == found


def test_a_log_without_item_file_is_an_error(folders):
    path = put(folders / 'here' / 'my.txt')
    put(folders / 'here' / 'my.item')
    with pytest.raises(UserError, match=r'my_items\.jsonl\.gz, or give one by --items') as caught:
        locate_items(path)
    assert str(caught.value).startswith(f'{path}: ')
