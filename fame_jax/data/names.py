"""Names of columns: the words in them, and the role that each name suggests."""

import itertools
import re
from typing import Literal, NamedTuple

# Nouns of each role, the likeliest rank first. Columns of one rank are equally likely.
NOUNS = {
    'user': (
        'user usr benutzer nutzer utilisateur usuario utente gebruiker',
        'customer cust kunde kunden client klant cliente reviewer visitor member account buyer '
        'shopper subscriber viewer listener player reader student learner person profile '
        'household consumer guest passenger traveler traveller patron rater voter follower',
        'session device cookie playlist',
    ),
    'item': (
        'item',
        'parentasin',
        'asin',
        'product prod produkt produit producto prodotto article artikel sku stockcode movie film '
        'book isbn ean gtin upc track song recording venue poi business place location '
        'restaurant recipe game app video clip podcast episode anime joke news document doc '
        'page post course lesson job hotel property listing offer goods photo image content '
        'paper repo beer wine dvd attraction food',
        'artist album channel',
    ),
    'rating': (
        'rating ratings userrating bookrating movierating reviewrating',
        'overall',
        'stars star reviewstars',
        'score reviewscore',
        'grade bewertung',
    ),
}
# Words around a noun, by how well they fit an id: user_id, then user and user_no, then user_name.
AFFIXES = {
    'id': 0, 'ids': 0, 'uuid': 0, 'guid': 0,
    '': 1, 'no': 1, 'nr': 1, 'num': 1, 'nummer': 1, 'number': 1, 'code': 1, 'key': 1, 'hash': 1,
    'idx': 1, 'index': 1, 'token': 1,
    'name': 2,
}  # fmt: skip
SHORT = {'user': {'uid': 'user'}, 'item': {'iid': 'item'}}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Columns with these last words are ids, amounts or places, and never times.
NOT_TIMES = frozenset(AFFIXES) - {''} | _words(
    'price amount cost zip phone lat lon latitude longitude isbn ean upc gtin sku asin rating '
    'count quantity qty size zone offset duration length'
)
CERTAIN = _words('timestamp unixtimestamp unixtime unixreviewtime')
TIMES = CERTAIN | _words(
    'timestamps time times ts datetime date dates dt when epoch epochtime reviewtime tstamp '
    'tdat tdate moment instant zeit zeitpunkt zeitstempel datum tijd tijdstip fecha fechahora '
    'tiempo horodatage czas время дата 时间 日期 时间戳 日時 日付'
)
# Last words: `order_date`, `eventTime`, `click_ts`.
LAST = _words('timestamp ts tstamp datetime date dt dat datum epoch zeitpunkt zeitstempel')
# Words before `time` that say when something was done.
EVENTS = _words(
    'event order click purchase buy pay review rating rate view check checkin in action '
    'interaction utc unix gmt local server visit transaction trans request log create created '
    'post comment start begin end access record behavior behaviour consume read'
)
# `bought_at`, `rated_on`.
DONE = _words('bought sold paid seen read sent done made taken given left built put')
# `watch_time` and the like are durations, and times where their values are.
DURATIONS = _words(
    'watch watching spent spend play playing dwell listen listening reading response total avg '
    'average elapsed running run wait load prep cook cooking screen idle travel session zone '
    'offset frame duration life'
)
# Times of something else than the action.
OTHERS = re.compile(
    'birth|dob$|releas|expir|publi|regist|signup|updat|modif|joined|memb|deadline|deliver|shipp|due'
)
TIME_WORDS = ('timestamp', 'datetime', 'datum', 'date', 'time', 'zeit', 'fecha')


def split_words(name: object) -> list[str]:
    """Returns the words of a column's name in lower case: 'InvoiceDate' is invoice, date.

    RecBole's type (`user_id:token`) is no part of the name.
    """
    bare = str(name).partition(':')[0]
    words = re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+', bare)
    return [word.casefold() for word in words]


def join_words(name: object) -> str:
    """Returns a column's name without case, blanks and signs: 'Customer ID' is 'customerid'."""
    return ''.join(split_words(name))


class Fit(NamedTuple):
    """How well a name fits a role; a smaller rank and form fit better."""

    rank: int
    noun: str
    form: int


def _fits(role: str) -> dict[str, Fit]:
    fits = {}
    for rank, nouns in enumerate(NOUNS[role]):
        affixes = {'': 1} if role == 'rating' else AFFIXES
        for noun, (affix, form) in itertools.product(nouns.split(), affixes.items()):
            for text in {noun + affix, affix + noun} if form < 2 else {noun + affix}:
                fits.setdefault(text, Fit(rank, noun, form))
    return fits | {text: fits[noun] for text, noun in SHORT.get(role, {}).items()}


FITS = {role: _fits(role) for role in NOUNS}


def fit(role: str, name: object) -> Fit | None:
    """Returns how well a name fits the role 'user', 'item' or 'rating'; None: not at all."""
    return FITS[role].get(join_words(name))


def time_name(name: object) -> Literal['time', 'maybe', 'dated', 'other', '', 'never']:
    """Returns what a name says about times.

    'time': the time of an action, whatever the numbers in the column. 'maybe': probably a time.
    'dated': a time if the values look like one. 'other': the time of something else, such as
    `birth_date`. '': nothing, or a duration. 'never': an id, an amount or a place.
    """
    words, joined = split_words(name), join_words(name)
    if joined in TIMES:
        return 'time'
    if OTHERS.search(joined):
        return 'other'
    last, before = (words or [''])[-1], set(words[:-1])
    if 'timestamp' in words:
        return 'time'
    if set(words) & DURATIONS:
        return 'maybe' if last in LAST else ''
    if last in LAST or (last == 'time' and before & EVENTS):
        return 'time'
    if last in ('at', 'on') and any(word in DONE or word.endswith('ed') for word in before):
        return 'time'
    if last in NOT_TIMES:
        return 'never'
    if set(words) & set(TIME_WORDS) or joined == 'day' or joined.endswith(('date', 'datum')):
        return 'maybe'
    if last in DONE or last.endswith(('ed', *TIME_WORDS)) or {'utc', 'data'} & set(words):
        return 'dated'
    return ''
