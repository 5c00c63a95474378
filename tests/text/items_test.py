"""Files about items: every format, texts, labels, and what is refused."""

import gzip
import io
import json
import re
import zipfile

import polars as pl
import pytest
from data_fixtures import real_path

from fame_jax.data.download import ITEMS
from fame_jax.errors import UserError
from fame_jax.text import item_files
from fame_jax.text import items as item_text

IDS = ['', '7', '8', '9']


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
FORMATS = {
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


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_is_read(tmp_path, name):
    content, text, id_field = FORMATS[name]
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


PATHS = [[['R', 'A', 'B', 'C'], ['R', 'D']], ['R', 'Test', ' Measure', 'B'], 'R > A']


@pytest.mark.parametrize(
    'facet, field, values, expected',
    [
        ('category2', 'categories', PATHS, [['A', 'D'], ['Test, Measure'], ['A']]),
        ('category3', 'categories', [PATHS[0], ['R', 'A', 'X']], [['B'], ['X'], []]),
        ('leaf_category', 'categories', [*PATHS[:2], ['R']], [['C', 'D'], ['B'], []]),
        ('categories', 'category', PATHS, [['A', 'B', 'C', 'D'], ['B', 'Test, Measure'], ['A']]),
        ('brand', 'brand', ['A', 'Unknown', 'generic'], [['A'], ['brand 6'], []]),
        (
            'genres',
            'genres',
            ['A|B', ['B', 'C'], '(no genres listed)'],
            [['A', 'B'], ['B', 'C'], []],
        ),
        ('decade', 'year', [1999, None, None], [['1990s'], ['2000s'], []]),
        ('director', 'director', ['A|B', ''], [['A', 'B'], [], []]),
        ('cast', 'cast', [['A', 'B'], 'A'], [['A', 'B'], ['A'], []]),
        ('colour', 'colour', ['x', 'X | y', None], [['X'], ['X', 'y'], []]),
        ('price', 'price', [1.0, 2.5, float('nan')], [['1'], ['2.5'], []]),
        ('store+size', 'store', ['A', None, 'B'], [['store: A'], ['size: s'], ['store: B']]),
    ],
)
def test_labels(tmp_path, facet, field, values, expected):
    """Labels of items 7, 8, 9 by a field of these values; item 8 has some other fields too."""
    rows = [{'item_id': n, 'title': '1984 in May', field: v} for n, v in zip((7, 8, 9), values)]
    rows[1] |= {'brand_id': 6, 'title': 'X (2001)', 'size': 's'}
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    (built,) = item_text.read(path, IDS, (), [facet], rarest=1, commonest=1).facets
    assert built.name == facet and built.by_item()[1:] == expected


@pytest.mark.parametrize('separator', [',', '\t', ';'])
def test_lone_quotes_swallow_no_items(tmp_path, separator):
    lines = 'item_id,title,year\n7,"Heroes,1977\n8,Queen,1973\n9,Oasis",1994\n'
    name = 'x.tsv' if separator == '\t' else 'x.csv'
    items = item_text.read(write(tmp_path, name, lines.replace(',', separator).encode()), IDS)
    assert items.titles == ['', '"Heroes', 'Queen', 'Oasis"']


def test_long_texts_in_quotes_are_read(tmp_path):
    lines = 'item_id,title,description\n7,A,"one, two\n\nthree"\n8,B,"say ""hi"", he\nsaid"\n9,C,\n'
    items = item_text.read(write(tmp_path, 'x.csv', lines.encode()), IDS, ['description'])
    assert items.texts == ['', 'one, two three', 'say "hi", he said', '']


def test_a_folder_of_item_files_is_one(tmp_path):
    (tmp_path / 'parts').mkdir()
    for row in ROWS:
        write(tmp_path / 'parts', f'part-{row["item_id"]}.jsonl', jsonl(row))
    assert item_text.read(tmp_path / 'parts', IDS).titles == ['', 'Seven', 'Eight', 'Nine']


def find(path, item_ids=IDS, **columns):
    """The id field that `read` uses, or its error after the path; titles use the same."""
    try:
        titles = item_text.read_titles(path, item_ids, **columns)
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            item_text.read(path, item_ids, **columns)
        return str(error).removeprefix(f'{path}: ')
    items = item_text.read(path, item_ids, **columns)
    assert items.titles == titles
    return items.card['id_field']


def test_the_ids_decide_between_two_numbers_of_an_item(tmp_path):
    rows = [{'movie_id': n + 10, 'item_id': n, 'title': f't{n}'} for n in (7, 8, 9)]
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    assert find(path) == 'item_id'
    assert find(path, ['', '17', '18', '19']) == 'movie_id'
    # Both have one item of the catalogue: the likelier name, as in a log.
    assert find(path, ['', '7', '17']) == 'item_id'
    # The less likely name has two, the likelier one has one: nothing tells.
    two = "'item_id' and 'movie_id' may be the item; name one: --columns=item_file_id:item_id"
    assert find(path, ['', '9', '17', '18']) == two
    assert find(path, ['', '9', '17', '18'], id_column='item_id') == 'item_id'
    assert find(path, ['', '9', '17', '18'], log_column='movie_id') == 'movie_id'


@pytest.mark.parametrize(
    'products, expected',
    [
        ((7, 8, 9), 'product'),  # either field gives the same items
        ((1, 2, 3), 'sku'),  # only one is of the catalogue
        (
            (9, 8, 7),
            "'product' and 'sku' may be the item; name one: --columns=item_file_id:product",
        ),
    ],
)
def test_two_equally_likely_fields(products, expected, tmp_path):
    rows = [{'product': p, 'sku': n, 'title': f't{n}'} for p, n in zip(products, (7, 8, 9))]
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    assert find(path) == expected
    assert find(path, log_column='SKU') == find(path, id_column='sku') == 'sku'


def test_a_field_of_few_items_in_many_records_is_no_rival(tmp_path):
    rows = [{'item_id': n, 'place': 7 + n % 2, 'title': f't{n}'} for n in range(7, 20)]
    assert find(write(tmp_path, 'x.jsonl', jsonl(*rows))) == 'item_id'


def test_a_field_of_other_ids_is_taken_only_where_it_is_named(tmp_path):
    rows = [{'sku': f's{n}', 'item_id': n, 'title': f't{n}'} for n in (7, 8, 9)]
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    assert find(path, log_column='sku') == 'item_id'
    assert find(path, id_column='sku').startswith(
        "the ids in 'sku', such as 's7', are none of the data set, such as '9'; "
    )


# Fields of a file, all with ids but the title; what is known; and the field or the refusal.
NAMED = [
    ('sku,title', {}, 'sku'),  # names of the reader of logs
    ('StockCode,title', {}, 'StockCode'),
    ('Artikel-Nr,title', {}, 'Artikel-Nr'),
    ('parent_asin,title', {}, 'parent_asin'),
    ('product_name,title', {}, 'product_name'),
    ('id,title', {}, 'id'),
    ('Product SKU,title', {'id_column': 'Product SKU'}, 'Product SKU'),
    ('Product SKU,title', {'id_column': 'product_sku'}, 'Product SKU'),
    ('Product SKU,title', {'log_column': 'Product SKU'}, 'Product SKU'),
    ('product-sku,title', {'log_column': 'Product SKU'}, 'product-sku'),
    ('product,title', {'log_column': 'Product SKU'}, 'product'),
    ('p-sku,p_sku,title', {'id_column': 'p_sku'}, 'p_sku'),
    ('p-sku,P SKU,title', {'id_column': 'p_sku'}, "'p-sku' and 'P SKU' may be the item; name one: "
     '--columns=item_file_id:p-sku'),
    ('p-sku,P SKU,title', {'log_column': 'p_sku'}, "'p-sku' and 'P SKU' may be the item; name one: "
     '--columns=item_file_id:p-sku'),
    ('Ref,title', {}, "there is no field with a known name of an item id; its fields are 'Ref', "
     "'title'; name one with --columns=item_file_id:NAME"),
    ('Ref,title', {'log_column': 'Code'}, "there is no field 'Code', as in the log, and none with "
     "a known name of an item id; its fields are 'Ref', 'title'; name one with "
     '--columns=item_file_id:NAME'),
    ('item,title', {'id_column': 'Code'}, "there is no field 'Code'; its fields are 'item', "
     "'title'; name one with --columns=item_file_id:NAME"),
]  # fmt: skip


@pytest.mark.parametrize('header, columns, expected', NAMED)
def test_the_id_field_is_found_by_its_name(header, columns, expected, tmp_path):
    ids = header.count(',')
    rows = ''.join(f'{f"{n}," * ids}t{n}\n' for n in (7, 8, 9))
    path = write(tmp_path, 'x.csv', f'{header}\n{rows}'.encode())
    assert find(path, **columns) == expected


@pytest.mark.parametrize(
    'given, card, expected',
    [
        ({}, {}, ('', '')),
        ({'item': 'Product_SKU'}, {'columns': {'item': 'Product SKU'}}, ('', 'Product SKU')),
        ({'item': 'sku'}, {}, ('', 'sku')),
        ({'item_file_id': 'Code'}, {'columns': {'item': 'sku'}}, ('Code', 'sku')),
        ({'item': '2'}, {'columns': {'user': '1', 'item': '2'}}, ('', '')),  # a position
    ],
)
def test_the_columns_of_a_run_by_which_ids_are_found(given, card, expected):
    found = item_text.id_columns(given, card)
    assert (found['id_column'], found['log_column']) == expected


def test_named_fields_are_found_without_regard_to_case_blanks_and_signs(tmp_path):
    rows = [{'sku': n, 'Main Colour': c, 'Kind': c} for n, c in zip((7, 8, 9), 'aab')]
    path = write(tmp_path, 'x.jsonl', jsonl(*rows))
    items = item_text.read(
        path, IDS, ['main_colour'], ['MainColour', 'kind'], rarest=1, commonest=1
    )
    assert items.texts == ['', 'a', 'a', 'b']
    assert [facet.by_item()[1:] for facet in items.facets] == [[['a'], ['a'], ['b']]] * 2


def test_text_is_cleaned(tmp_path):
    row = {'item_id': '7', 'title': ' A\t&lt;b&gt; \n\u00a0C\x07 \ud800D. ', 'keywords': 'k'}
    path = write(tmp_path, 'x.jsonl', jsonl(row))
    assert item_text.read(path, IDS).texts[1] == 'A <b> C D. k'


def test_equal_records_count_once(tmp_path):
    items = item_text.read(write(tmp_path, 'x.jsonl', jsonl(*ROWS, ROWS[0])), IDS)
    assert items.card['records'] == 4 and items.card['matched'] == 3


CSV = b'item_id,title\n7,a\n8,b\n'
# name of the case: (file, content, options, the message after the file's name)
MISTAKES = {
    'empty': ('x.jsonl', b'', {}, ': empty file'),
    'no records': ('x.csv', b'item_id,title\n', {}, ': there are no records after the header'),
    'nul': ('x.jsonl', jsonl(*ROWS) + b'{"item_id": \0}', {}, ', line 4, byte 13: a NUL byte'),
    'broken': ('x.jsonl', jsonl(*ROWS) + b'{"item_id": 3, "ti\n', {}, ', line 4: not JSON'),
    'call': ('x.jsonl', b'{"item_id": exit()}\n', {}, ', line 1: not JSON'),
    'deep': ('x.jsonl', b'[' * 99999, {}, ', line 1: not JSON'),
    'array': ('x.json', b'[{"item_id": 7}, 8]', {}, ', object 2: 8 is not a JSON object'),
    'no id': ('x.jsonl', jsonl(ROWS[0], {'title': 'x'}), {}, ", line 2: the id 'item_id' is miss"),
    'list id': ('x.jsonl', jsonl(ROWS[0], {'item_id': [1]}), {}, r', line 2: the id .* is \[1\]'),
    'no id csv': ('x.csv', CSV + b',c\n', {}, ", line 4: the id 'item_id' is missing"),
    'no id field': ('x.csv', b'a,b\n1,2\n', {}, ": .* of an item id; its fields are 'a', 'b'"),
    'wrong id': ('x.csv', CSV, {'id_column': 'sku'}, ": there is no field 'sku'; its fields are"),
    'twice': ('x.csv', CSV + b'7,c\n', {}, ", line 4: item '7' has another record on line 2"),
    'other ids': ('x.csv', b'iid,title\nB0,a\n', {}, ": the ids in 'iid', such as 'B0', .* as '9'"),
    'no text': ('x.csv', b'item_id,title,c\n7,,1\n', {}, ": 'title' have no text for any item"),
    'no field': ('x.csv', b'item_id,c\n7,1\n', {}, ": .* none of the text .* are 'item_id', 'c'"),
    'text field': ('x.csv', CSV, {'text_fields': ['a']}, ": there is no field for text field 'a'"),
    'facet': ('x.csv', CSV, {'facets': ['c']}, ": there is no .* facet 'c'; .* facets are brand"),
    'made facet': ('x.csv', CSV, {'facets': ['category2']}, ": there .* for facet 'category2'"),
    'short dat': ('movies.dat', FILMS + b'10::x\n', {}, r", line 4: expected 'id::title::genres'"),
    'short u.item': ('u.item', U_ITEM + b'10|x\n', {}, ', line 4: 2 fields, and u.item has 24'),
    'two columns': ('x.csv', b'item_id,a,a\n7,1,2\n', {}, ", line 1: two columns are called 'a'"),
    'kind': ('x.pdf', b'%PDF', {}, ': the format is unknown'),
    'other zip': ('x.zip', archive(a__txt=b'x'), {}, ': the archive has none of movies.dat'),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, case):
    name, content, options, expected = MISTAKES[case]
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        item_text.read(path, IDS, **options)
    message = str(caught.value)
    assert re.match(re.escape(str(path)) + expected, message), message
    assert '\n' not in message and len(message) < 400 + len(str(path))


@pytest.mark.parametrize('name', ['x.jsonl', 'x.item', 'x.zip', 'movies.dat', 'x.what'])
def test_a_missing_file_or_a_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match='No such file'):
        item_text.read(tmp_path / name, IDS)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match='this is a folder'):
        item_text.read(tmp_path / name, IDS)


def test_a_path_is_checked_without_reading_it(tmp_path):
    for name in ('x.jsonl', 'x.csv.gz', 'u.item', 'ml.zip', 'x.item'):
        item_files.check_path(write(tmp_path, name, b'\0'), 'looking')
    (tmp_path / 'parts').mkdir()
    item_files.check_path(tmp_path / 'parts', 'looking')
    item_files.check_path(tmp_path / '*.csv.gz', 'looking')
    for name, message in (
        ('y.csv', 'looking: No such file or directory; check the path'),
        ('*.tsv', 'looking: No such file or directory; check the path'),
        ('x.pdf', f'{tmp_path}/x.pdf: the format is unknown; the name must end in one of .jsonl, '),
    ):
        write(tmp_path, 'x.pdf', b'')
        with pytest.raises(UserError) as error:
            item_files.check_path(tmp_path / name, 'looking')
        assert str(error.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, items, titles, brands, categories',
    [
        ('toys', 11_924, 11_865, 9523, 377),
        ('beauty', 12_101, 12_094, 9991 - 46, 228),
        ('sports', 18_357, 0, 11_040 - 41, 1010),
    ],
)
def test_public_data_sets(name, items, titles, brands, categories):
    """Brands without 'Unknown' and 'Generic'; all category paths of an item count."""
    path = real_path(f'{ITEMS[name][0]}.jsonl.gz')
    with gzip.open(path) as file:
        paths = [json.loads(line)['categories'] for line in file]
    ids = ['', *(str(n + 1) for n in range(len(paths)))]
    actual = item_text.read(path, ids, (), ['brand', 'leaf_category'], commonest=1)
    assert actual.card['matched'] == actual.card['records'] == items
    assert actual.card['items_without_text'] == actual.card['records_beyond'] == 0
    assert sum(map(bool, actual.titles)) == titles
    brand, leaf = actual.facets
    assert brand.card['items_found'] == brands
    assert leaf.card['labels_found'] == categories
    assert leaf.card['items_found'] == sum(any(len(one) > 1 for one in item) for item in paths)
