"""Files about items: every form they come in, what is made of them, and what may be wrong."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import polars as pl
import pytest

from fame_jax.data import item_text
from fame_jax.data.download import ITEMS
from fame_jax.errors import UserError

IDS = ['', '7', '8', '9']
DATA = Path(os.environ.get('FAME_JAX_DATA', 'nowhere'))


def jsonl(*rows):
    return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


def archive(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as writer:
        for name, content in files.items():
            writer.writestr(f'ml/{name.replace("__", ".")}', content)
    return file.getvalue()


def parquet(**columns):
    file = io.BytesIO()
    pl.DataFrame(columns).write_parquet(file)
    return file.getvalue()


ROWS = [
    {'item_id': 8, 'title': 'Eight', 'brand': 'Lego', 'categories': [['Toys', 'Cars', 'Red']]},
    {'item_id': 7, 'title': 'Seven', 'brand': 'LEGO', 'categories': [['Toys', 'Cars']]},
    {'item_id': 9, 'title': 'Nine', 'brand': None, 'categories': [['Toys', 'Dolls', 'Red']]},
]
FILMS = b'7::Heat (1995)::Action|Crime\n8::Am\xe9lie (2001)::Comedy\n9::Up (2009)::Action|Comedy\n'
U_ITEM = b''.join(
    b'%d|Film %d (1995)|01-Jan-1995||http://x|%s\n'
    % (n, n, b'|'.join(b'1' if flag in flags else b'0' for flag in range(19)))
    for n, flags in ((7, {1, 2}), (8, {2}), (9, {0, 1}))
)
AMAZON_2014 = (
    b"{'asin': '7', 'title': 'It\\'s', 'brand': 'A', 'categories': [['R', 'X']]}\n"
    b"{'asin': '8', 'categories': [['R', 'Y']], 'description': \"C:\\d &amp; more\"}\n"
)
AMAZON_2018 = jsonl(
    {'asin': '7', 'category': ['R', 'X &amp; Y', 'Z'], 'description': ['one', 'two'], 'title': 'T'},
    {'asin': '9', 'category': ['R', 'W'], 'description': [], 'title': ''},
)
AMAZON_2023 = jsonl(
    {'parent_asin': '7', 'store': 'A', 'categories': ['R', 'X'], 'details': {'k': 'v'}},
    {'parent_asin': '9', 'store': 'B', 'categories': ['R', 'W'], 'details': {}},
)
RECBOLE = (
    b'item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n'
    b'7\tToy "Story\t1995\tComedy Drama\n8\tHeat\t1996\tDrama\n'
)
# name of the file: (content, text of item 7, id field)
FORMS = {
    'x_items.jsonl': (jsonl(*ROWS), 'Seven. LEGO. Toys > Cars', 'item_id'),
    'x.jsonl.gz': (gzip.compress(jsonl(*ROWS)), 'Seven. LEGO. Toys > Cars', 'item_id'),
    'meta.json': (AMAZON_2014, "It's. A. R > X", 'asin'),
    'meta_2018.json.gz': (gzip.compress(AMAZON_2018), 'T. R > X & Y > Z. one, two', 'asin'),
    'meta_2023.jsonl': (AMAZON_2023, 'A. R > X', 'parent_asin'),
    'movies.csv': (
        b'movieId,title,genres\n7,"Heat, Part 2 (1995)",Action|Crime\n',
        'Heat, Part 2 (1995). Action, Crime',
        'movieId',
    ),
    'movies.dat': (FILMS, 'Heat (1995). Action, Crime', 'movie_id'),
    'u.item': (U_ITEM, 'Film 7 (1995). Action, Adventure', 'movie_id'),
    'ml-1m.zip': (archive(movies__dat=FILMS), 'Heat (1995). Action, Crime', 'movie_id'),
    'ml-100k.zip': (archive(u__item=U_ITEM), 'Film 7 (1995). Action, Adventure', 'movie_id'),
    'ml-20m.zip': (archive(movies__csv=b'movieId,title\n7,Heat\n'), 'Heat', 'movieId'),
    'ml-100k.item': (RECBOLE, 'Toy "Story. Comedy, Drama', 'item_id'),
    'x.tsv': (b'iid\ttitle\n7\t A &amp;amp;  B\n', 'A & B', 'iid'),
    'x.parquet': (parquet(id=[7.0], title=['A'], genres=[['b', 'c']]), 'A. b, c', 'id'),
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize('name', FORMS)
def test_every_form_is_read(tmp_path, name):
    content, text, id_field = FORMS[name]
    items = item_text.read(write(tmp_path, name, content), IDS)
    assert items.texts[:2] == ['', text] and len(items.texts) == len(items.titles) == 4
    assert items.card['id_field'] == id_field and items.card['source'] == name
    assert re.fullmatch('[0-9a-f]{64}', items.card['sha256'])


def test_by_hand(tmp_path):
    rows = [*ROWS, {'item_id': 99, 'title': 'Beyond', 'brand': 'Other', 'categories': []}]
    items = item_text.read(
        write(tmp_path, 'x.jsonl', jsonl(*rows)),
        [*IDS, '10'],
        ('brand', 'title'),
        ['category2'],
        rarest=1,
        commonest=0.5,  # of four items
    )
    assert items.texts == ['', 'LEGO. Seven', 'Lego. Eight', 'Nine', '']
    assert items.titles == ['', 'Seven', 'Eight', 'Nine', '']
    assert items.facets[0].labels == ['Cars', 'Dolls']
    assert items.facets[0].label_VS.tolist() == [[-1], [0], [0], [1], [-1]]
    card = items.card
    assert card['text_fields'] == {'brand': 2, 'title': 3} and card['reader'] == 'JSON lines'
    assert (card['records'], card['matched']) == (4, 3)
    assert (card['items_without_record'], card['records_beyond']) == (1, 1)
    assert card['items_without_text'] == 1
    json.dumps(card)


def test_one_brand_left_is_told(tmp_path):
    path = write(tmp_path, 'x.jsonl', jsonl(*ROWS))
    with pytest.raises(UserError, match="facet 'brand': 1 of 1 labels left"):
        item_text.read(path, IDS, (), ['brand'], rarest=1, commonest=1)


def labels(tmp_path, facet, *rows):
    """The label names of items 7, 8, 9, which the rows describe in turn."""
    rows = [{'item_id': n, 'title': 't'} | row for n, row in zip((7, 8, 9), rows)]
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    found = item_text.read(path, IDS, (), [facet], rarest=1, commonest=1).facets[0]
    assert found.name == facet
    return [[found.labels[n] for n in row if n >= 0] for row in found.label_VS[1:]]


PATHS = [
    {'categories': [['R', 'A', 'B', 'C'], ['R', 'D']]},
    {'categories': ['R', 'Test', ' Measure', 'B']},
    {'categories': 'R > A'},
]


@pytest.mark.parametrize(
    'facet, rows, expected',
    [
        ('category2', PATHS, [['A', 'D'], ['Test, Measure'], ['A']]),
        ('category3', [PATHS[0], {'categories': ['R', 'A', 'X']}], [['B'], ['X'], []]),
        ('leaf_category', PATHS, [['C', 'D'], ['B'], ['A']]),
        ('leaf_category', [*PATHS[:2], {'categories': ['R']}], [['C', 'D'], ['B'], []]),
        ('categories', PATHS, [['A', 'B', 'C', 'D'], ['B', 'Test, Measure'], ['A']]),
        (
            'brand',
            [{'brand': 'A'}, {'brand': 'Unknown', 'brand_id': 5}, {'brand': 'generic'}],
            [['A'], ['brand 5'], []],
        ),
        ('brand', [{'brand': 'A', 'brand_id': 5}, {'brand_id': 6}], [['A'], ['brand 6'], []]),
        (
            'genres',
            [{'genres': 'A|B'}, {'genres': ['B', 'C']}, {'genres': '(no genres listed)'}],
            [['A', 'B'], ['B', 'C'], []],
        ),
        (
            'decade',
            [{'year': 1999}, {'title': 'X (2001)'}, {'year': None, 'title': '1984 in May'}],
            [['1990s'], ['2000s'], []],
        ),
        (
            'director',
            [{'director': 'A'}, {'llm_description': 'directed by Bo Cy. It'}, {'director': ''}],
            [['A'], ['Bo Cy'], []],
        ),
        (
            'cast',
            [{'cast': ['A', 'B']}, {'llm_description': 'starring Cy Dix.'}],
            [['A', 'B'], ['Cy Dix'], []],
        ),
        (
            'colour',
            [{'colour': 'x'}, {'colour': 'X | y'}, {'colour': None}],
            [['X'], ['X', 'y'], []],
        ),
        ('price', [{'price': 1.0}, {'price': 2.5}, {'price': float('nan')}], [['1'], ['2.5'], []]),
        (
            'brand+genres',
            [{'brand': 'A', 'genres': ['A']}, {'genres': ['B']}, {'brand': 'B'}],
            [['brand: A', 'genres: A'], ['genres: B'], ['brand: B']],
        ),
    ],
)
def test_labels(tmp_path, facet, rows, expected):
    assert labels(tmp_path, facet, *rows) == expected


def test_the_id_field_that_fits_is_taken(tmp_path):
    """One file, numbered anew and with the original number: the data set says which is meant."""
    rows = [{'item_id': n, 'movie_id': n + 10, 'title': f't{n}'} for n in (7, 8, 9)]
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    items = item_text.read(path, IDS)
    assert items.card['id_field'] == 'item_id' and items.titles == ['', 't7', 't8', 't9']
    # Half of the file each: the likelier name.
    assert item_text.read(path, ['', '7', '17']).card['id_field'] == 'item_id'
    items = item_text.read(path, ['', '9', '17', '18'])
    assert items.card['id_field'] == 'movie_id' and items.titles == ['', '', 't7', 't8']
    items = item_text.read(path, ['', '9', '17', '18'], id_column='item_id')
    assert items.titles == ['', 't9', '', '']


def test_text_is_cleaned(tmp_path):
    row = {'item_id': '7', 'title': ' A\t&lt;b&gt; \n\u00a0C\x07 \ud800D. ', 'keywords': 'k'}
    path = write(tmp_path, 'x.jsonl', jsonl(row))
    assert item_text.read(path, IDS).texts[1] == 'A <b> C D. k'


def test_a_record_written_twice_is_one(tmp_path):
    items = item_text.read(write(tmp_path, 'x.jsonl', jsonl(*ROWS, ROWS[0])), IDS)
    assert items.card['records'] == 4 and items.card['matched'] == 3


CSV = b'item_id,title\n7,a\n8,b\n'
# name of the case: (file, content, options, what the message must say after the file's name)
MISTAKES = {
    'empty': ('x.jsonl', b'', {}, ': empty file'),
    'empty gzip': ('x.jsonl.gz', gzip.compress(b''), {}, ': nothing inside'),
    'empty dat': ('movies.dat', b'', {}, ': empty file'),
    'blank': ('x.jsonl', b'\n\n', {}, ': only blank lines'),
    'no records': ('x.csv', b'item_id,title\n', {}, ': a header and no records'),
    'nul': ('x.jsonl', jsonl(*ROWS) + b'{"item_id": \0}', {}, ', line 4, byte 13: a NUL byte'),
    'nul dat': ('movies.dat', FILMS + b'10::\0::x', {}, ', line 4, byte 5: a NUL byte'),
    'broken': ('x.jsonl', jsonl(*ROWS) + b'{"item_id": 3, "ti\n', {}, ', line 4: not JSON'),
    'call': ('x.jsonl', b'{"item_id": exit()}\n', {}, ', line 1: not JSON'),
    'deep': ('x.jsonl', b'[' * 99999, {}, ', line 1: not JSON'),
    'array': ('x.json', b'[{"item_id": 7}]', {}, ', line 1: not a JSON object'),
    'no id': ('x.jsonl', jsonl(ROWS[0], {'title': 'x'}), {}, ", line 2: 'item_id' is missing"),
    'odd id': ('x.jsonl', jsonl(ROWS[0], {'item_id': [1]}), {}, r", line 2: 'item_id' is \[1\]"),
    'no id csv': ('x.csv', CSV + b',c\n', {}, ", line 4: 'item_id' is missing"),
    'no id field': ('x.csv', b'a,b\n1,2\n', {}, ": no field looks like .* found 'a', 'b'"),
    'wrong id': ('x.csv', CSV, {'id_column': 'sku'}, ": no field 'sku'; found 'item_id', 'title'"),
    'twice': ('x.csv', CSV + b'7,c\n', {}, ", line 4: item '7' is described on line 2 already"),
    'alien': (
        'x.csv', b'item_id,title\nB00,a\n', {},
        ": no item .* like '9', .*'item_id' like 'B00'",
    ),
    'no text': ('x.csv', b'item_id,title,c\n7,,1\n', {}, ": no text in 'title' of any item"),
    'no field': ('x.csv', b'item_id,c\n7,1\n', {}, ": none of the text .* found 'item_id', 'c'"),
    'text field': (
        'x.csv', CSV, {'text_fields': ['abstract']},
        ": no field for text field 'abstract'; found 'item_id', 'title'",
    ),
    'facet': (
        'x.csv', CSV, {'facets': ['colour']},
        ": no field for facet 'colour'; found 'item_id', 'title'; known facets: brand",
    ),
    'derived facet': ('x.csv', CSV, {'facets': ['category2']}, ": no field for facet 'category2'"),
    'part of facet': ('x.csv', CSV, {'facets': ['title+x']}, ": no field for facet 'x'"),
    'short dat': ('movies.dat', FILMS + b'10::x\n', {}, r", line 4: expected 'id::title::genres'"),
    'no fields': ('movies.dat', FILMS + b'10\n', {}, r", line 4: expected 'id::title::genres'"),
    'short u.item': ('u.item', U_ITEM + b'10|x\n', {}, ', line 4: 2 fields where u.item has 24'),
    'ragged': ('x.csv', CSV + b'9\n', {}, ', line 4: 1 fields where the header has 2'),
    'two columns': ('x.csv', b'item_id,a,a\n7,1,2\n', {}, ", line 1: two columns 'a'"),
    'latin-1': ('x.csv', CSV + b'9,\xe9\n', {}, ', line 4, byte 3: 0xe9 is not UTF-8'),
    'kind': ('x.pdf', b'%PDF', {}, ': not a kind of items file'),
    'gzip': ('movies.dat.gz', b'\x1f\x8b and not gzip', {}, ': not gzip'),
    'gzip cut short': ('movies.dat.gz', b'\x1f\x8bnot', {}, ': cut short'),
    'zip': ('x.zip', b'PK', {}, ': not a zip archive'),
    'other zip': ('x.zip', archive(a__txt=b'x'), {}, ': none of movies.dat'),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes_are_told_in_one_line(tmp_path, case):
    name, content, options, said = MISTAKES[case]
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        item_text.read(path, IDS, **options)
    message = str(caught.value)
    assert re.match(re.escape(str(path)) + said, message), message
    assert '\n' not in message and len(message) < 400 + len(str(path))


@pytest.mark.parametrize('name', ['no.jsonl', 'no.item', 'no.zip', 'movies.dat', 'no.what'])
def test_a_missing_file_is_told(tmp_path, name):
    with pytest.raises(UserError, match='No such file'):
        item_text.read(tmp_path / name, IDS)


@pytest.mark.parametrize('name', ['folder', 'folder.jsonl', 'folder.item'])
def test_a_folder_is_told(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match='a folder, where a file belongs'):
        item_text.read(tmp_path / name, IDS)


def test_polars_is_not_loaded_for_json_lines(tmp_path):
    path = write(tmp_path, 'x.jsonl', jsonl(*ROWS))
    code = (
        'import sys; from fame_jax.data import item_text; '
        f'item_text.read({str(path)!r}, {IDS}); sys.exit("polars" in sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def read_real(name, facets=(), **limits):
    path = DATA / f'{ITEMS[name][0]}.jsonl.gz'
    if not path.is_file():
        pytest.skip('needs the real files under FAME_JAX_DATA')
    with gzip.open(path) as file:
        ids = ['', *(str(n + 1) for n, _ in enumerate(file))]
    return item_text.read(path, ids, (), facets, **limits), path


def count_firsts(path):
    """Names at the second level and at the leaves of each item's first path alone."""
    with gzip.open(path) as file:
        paths = [json.loads(line)['categories'][0] for line in file]
    return len({path[1] for path in paths if len(path) > 1}), len({path[-1] for path in paths})


@pytest.mark.parametrize(
    'name, items, titles, brands, second, leaves, found',
    [
        ('toys', 11_924, 11_865, 9523, 23, 358, (41, 377)),
        ('beauty', 12_101, 12_094, 9991 - 46, 6, 220, (10, 228)),
        ('sports', 18_357, 0, 11_040 - 41, 28, 912, (76, 1010)),
    ],
)
def test_the_amazon_files(name, items, titles, brands, second, leaves, found):
    """Brands less 'Unknown' and 'Generic'; each path counts, where the first alone has fewer."""
    real, path = read_real(name, ['brand', 'category2', 'leaf_category'], commonest=1)
    assert real.card['matched'] == real.card['records'] == items == len(real.texts) - 1
    assert real.card['items_without_text'] == real.card['records_beyond'] == 0
    assert sum(map(bool, real.titles)) == titles
    brand, category2, leaf = real.facets
    assert brand.card['items_found'] == brands
    assert count_firsts(path) == (second, leaves)
    assert (category2.card['labels_found'], leaf.card['labels_found']) == found
    assert brand.label_VS.shape == (items + 1, 1)


def test_the_scientific_file():
    real, _ = read_real('scientific', ['brand', 'category2', 'leaf_category'])
    assert real.card['matched'] == 4344 and all(real.titles[1:])
    assert real.card['text_fields']['description'] == 4221
    assert real.facets[2].card['items_found'] == 4213
    assert 'Test, Measure & Inspect' in real.facets[1].labels


def test_the_films():
    real, _ = read_real('ml-1m', ['genres', 'decade', 'director', 'cast'])
    assert real.card['matched'] == 3307 and all(real.texts[1:])
    genres, decade, director, cast = real.facets
    assert genres.card['labels_found'] == 18
    assert genres.card['items_found'] == decade.card['items_found'] == 3307
    assert director.card['items_found'] > 0.99 * 3307 and cast.card['items_found'] > 0.88 * 3307
    row = director.label_VS[real.titles.index('Titanic (1997)')]
    assert [director.labels[n] for n in row if n >= 0] == ['James Cameron']


def test_sports_takes_under_two_seconds():
    began = time.process_time()
    read_real('sports', ['brand', 'category2', 'leaf_category'])
    assert time.process_time() - began < 2
