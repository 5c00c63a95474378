"""Hostile files and arguments: the right result, or one line that says what is wrong."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_fixtures import ITEM_IDS, make_recommender

from fame_jax.errors import UserError
from fame_jax.serving import answers, export, histories

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')

# JSON texts of an id, and the id; None where the line must be refused.
IDS = {
    **{'"a"': 'a', '7': '7', '7.0': '7', '" 7 "': '7', '1e2': '100', '-3': '-3', '"007"': '007'},
    **{r'"\u0041"': 'A', r'"\ud83d\ude00"': '😀', r'"\u0000"': '\0', '""': '', '-0.0': '0'},
    **{'12345678901234567890': '12345678901234567890', '"x\u2028y"': 'x\u2028y', '"ü"': 'ü'},
    **{r'"\"q\""': '"q"', r'"a\tb"': 'a\tb', '"日本"': '日本', '"NA"': 'NA', '"null"': 'null'},
    **dict.fromkeys(['true', 'null', '1.5', '[]', '{}', r'"\ud800"', 'NaN', '1e999', '"\t"', 'x']),
    **dict.fromkeys(['9007199254740993.0', '["a"]', '-Infinity', "'a'", '"a', r'"\x"', '07', '']),
}
ID = st.sampled_from(sorted(IDS))
GOOD = st.sampled_from(sorted(text for text in IDS if IDS[text] is not None))
BLANKS = st.sampled_from(['', ' ', '  ', '\t'])


@st.composite
def lines(draw):
    """A line of a file, its user and items; None where it must be refused."""
    some_id = GOOD if draw(st.integers(0, 3)) else ID
    texts = draw(st.lists(some_id, max_size=4))
    items = [IDS[text] for text in texts]
    between = draw(BLANKS) + ',' + draw(BLANKS)
    text, user = f'[{between.join(texts)}]', ''
    if texts == [''] and draw(st.just(True)):
        items = []  # [] is an empty history
    if draw(st.booleans()):
        user_text = draw(st.none() | some_id)
        user = '' if user_text is None else IDS[user_text]
        fields = [f'"items":{draw(BLANKS)}{text}']
        fields += [] if user_text is None else [f'"user": {user_text}']
        fields += ['"more": [1, {"x": null}]'] * draw(st.integers(0, 1))
        text = '{' + ','.join(draw(st.permutations(fields))) + '}'
    kind = draw(st.sampled_from(['', '', '', '', ' ', 'cut', 'more']))
    text = {'cut': text[:-1], 'more': f'{text}{text}'}.get(kind, kind + text)
    refused = kind in ('cut', 'more') or None in items or user is None
    return text, None if refused else (user, items)


def check_histories(path, made, newline, blank):
    content = newline.join(text + newline * blank for text, _ in made)
    path.write_bytes(content.encode('utf-8'))
    expected = [value for _, value in made]
    found, error = [], ''
    try:
        found.extend((history.user, history.items) for history in histories.read(path))
    except UserError as refusal:
        error = str(refusal)
    faulty = expected.index(None) if None in expected else None
    if faulty is None:
        found == expected or pytest.fail(f'{content!r}: {found}, not {expected}')
        assert not error
        return
    assert f'{path}, line {1 + faulty * (1 + blank)}: ' in error, (content, error)
    assert '\n' not in error and len(error) < 300


def settings_of(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


FILES = given(
    st.lists(lines(), min_size=1, max_size=5), st.sampled_from(['\n', '\r\n']), st.booleans()
)


@settings_of(150)
@FILES
def test_histories_are_right_or_refused_with_their_line(tmp_path, made, newline, blank):
    check_histories(tmp_path / 'h.jsonl', made, newline, blank)


@pytest.mark.fuzz
@settings_of(2000)
@FILES
def test_thousands_of_histories(tmp_path, made, newline, blank):
    check_histories(tmp_path / 'h.jsonl', made, newline, blank)


BYTES = given(
    st.binary(max_size=60) | st.text(max_size=30).map(lambda t: t.encode(errors='replace'))
)


def check_bytes(path, content):
    """Any bytes as a file of histories, of ids, or gzipped: an answer for each, or one line."""
    recommender = ANSWERING
    for name in ('h.jsonl', 'h.jsonl.gz'):
        (path / name).write_bytes(content)
        try:
            read = list(histories.read(path / name))
            found = list(answers.answer(recommender, read, 3))
            out = path / 'o.jsonl'
            answers.writer(out)(out, found)
            assert len(out.read_bytes().splitlines()) == len(read) <= histories.count(path / name)
        except UserError as error:
            assert '\n' not in str(error)
    try:
        ids = histories.read_ids(path / 'h.jsonl')
        assert ids and all(name == name.strip() != '' for name in ids)
    except UserError as error:
        assert '\n' not in str(error)


ANSWERING = make_recommender()[0]


@settings_of(100)
@BYTES
def test_any_bytes(tmp_path, content):
    check_bytes(tmp_path, content)


@pytest.mark.fuzz
@settings_of(1000)
@BYTES
def test_thousands_of_bytes(tmp_path, content):
    check_bytes(tmp_path, content)


# Arguments in Python

ANY = st.one_of(
    st.sampled_from(ITEM_IDS[1:]),
    st.text(max_size=3),
    st.integers(-9, 9),
    st.floats(),
    st.sampled_from([None, True, b'a', (), 1j, np.float32(7), np.int8(7), np.array(7), '\ud800']),
)


def known_index(value):
    """The index of an id by plain rules, None of an unknown one; TypeError where it is no id."""
    if isinstance(value, str):
        text = value if value in ITEM_IDS[1:] else value.strip()
    else:
        is_number = isinstance(value, int | float | np.number) and not isinstance(
            value, bool | complex
        )
        is_rounded = isinstance(value, float) and not abs(value) < 2**53  # NaN too
        if not is_number or is_rounded or value != int(value):
            raise TypeError
        text = str(int(value))
    return ITEM_IDS.index(text) if text in ITEM_IDS[1:] else None


def check_arguments(history, allow, deny, k):
    try:
        seen, chosen, denied = (
            [known_index(x) for x in ids or ()] for ids in (history, allow, deny)
        )
        right = k >= 1 and (not allow or any(v is not None for v in chosen))
    except TypeError:
        right = False
    try:
        answer = ANSWERING.recommend(history, k, allow=allow, deny=deny)
    except (TypeError, ValueError) as error:
        assert not right, error
        return
    assert right
    left = {*range(1, len(ITEM_IDS))} if allow is None else {*chosen} - {None}
    left -= {*denied, *seen}
    assert len(answer.items) == min(k, len(left))
    assert {*answer.items} <= {ITEM_IDS[v] for v in left}
    assert len(answer.unknown) == seen.count(None)


ARGUMENTS = given(
    st.lists(ANY, max_size=5),
    st.none() | st.lists(ANY, max_size=3),
    st.lists(ANY, max_size=3),
    st.sampled_from([1, 2, 5, 13, 10**9, 0, -1]),
)


@settings_of(200)
@ARGUMENTS
def test_any_arguments(history, allow, deny, k):
    check_arguments(history, allow, deny, k)


@pytest.mark.fuzz
@settings_of(2000)
@ARGUMENTS
def test_thousands_of_arguments(history, allow, deny, k):
    check_arguments(history, allow, deny, k)


# Exports whose files were changed and whose checksums were made to fit


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile') / 'export'
    make_recommender()[0].export(folder)
    return folder


def check_export(folder, original, name, change, place, value):
    """It is refused in one line, or loads; and where it loads, it answers or says why not."""
    shutil.copytree(original, folder, dirs_exist_ok=True)
    content = bytearray((folder / name).read_bytes())
    at = place % len(content)
    if change == 'byte':
        content[at] = value
    elif change == 'cut':
        del content[at:]
    elif change == 'gap':
        del content[at : at + 1 + value]
    elif change == 'swap' and name.endswith('.json'):
        card = json.loads(content)
        keys = sorted(card)
        card[keys[at % len(keys)]] = [None, [], {}, 'x', -1, 1e99, True, [1], [''] * 3][value % 9]
        content = json.dumps(card).encode()
    (folder / name).write_bytes(content)
    export.write_sums(folder)
    try:
        recommender = export.load(folder)
    except UserError as error:
        assert '\n' not in str(error) and str(folder) in str(error)
        return False
    assert len(recommender.titles) == len(recommender.item_ids)
    return True


def change_exports(tmp_path, exported, times, seed):
    """So many random changes; how many were refused."""
    draw = np.random.default_rng(seed)
    names = [path.name for path in sorted(exported.iterdir()) if path.name != export.SUMS]
    refused = 0
    for n in range(times):
        kind = ('byte', 'cut', 'gap', 'swap')[n % 4]
        place, value = int(draw.integers(10**6)), int(draw.integers(256))
        name = names[n // 4 % len(names)]
        refused += not check_export(tmp_path / 'copy', exported, name, kind, place, value)
    return refused


def test_changed_exports_are_refused_in_one_line(tmp_path, exported):
    assert change_exports(tmp_path, exported, 60, seed=0) > 20


@pytest.mark.fuzz
def test_hundreds_of_changed_exports(tmp_path, exported):
    assert change_exports(tmp_path, exported, 400, seed=1) > 140
