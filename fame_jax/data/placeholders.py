"""Ids that stand for no id or for several, and users that are probably many."""

import re

import numpy as np

from fame_jax.data.sources import show
from fame_jax.errors import UserError

# Ids that stand for no id, in lower case.
WORDS = (
    'na n/a #n/a <na> nan null (null) \\n none nil -1 - ? undefined unknown anonymous anon guest '
    'missing'
)
PLACEHOLDERS = {*WORDS.split(), 'not set', '(not set)'}
# A share of the records, and a number of times the median, above which they are refused; the share
# above which one user is named.
SHARE, TIMES, HEAVY = 0.01, 10, 0.1
LIST = re.compile(r'\[.*\]|\(.*,.*\)|\d+(?:[ ,;|]+\d+)+', re.DOTALL)


def check_ids(place: str, role: str, codes: np.ndarray, ids: list[str], hint: str) -> list[str]:
    """Returns lines about ids such as `NA`, and about a user with a large part of the log.

    Args:
      place: the file, for messages.
      role: 'user' or 'item'.
      codes: int [A], indices into ids.
      ids: ids as text.
      hint: the end of a message: another column, or something else to do.

    Raises:
      UserError: if an id such as `NA` has more than 1 % of the records and at least 10 times as
        many as the median id, or if most items are lists.
    """
    counts, notes = np.bincount(codes, minlength=len(ids)), []
    first = ids[:1000] if role == 'item' else []
    lists = [name for name in first if LIST.fullmatch(name)]
    if 2 * len(lists) > len(first):
        what = f'{len(lists):,} of the first {len(first):,} items are lists: {show(lists[0])}, ...'
        raise UserError(f'{place}: {what}; write one action per line')
    least = TIMES * np.median(counts)
    named = [
        code for code, name in enumerate(ids) if len(name) < 12 and name.casefold() in PLACEHOLDERS
    ]
    for code in named:
        count = int(counts[code])
        share = f'{count:,} of {len(codes):,} records have the {role} {show(ids[code])}'
        if count > SHARE * len(codes) and count >= least:
            raise UserError(f'{place}: {share}, which looks like a missing id; {hint}')
        notes.append(f'{share}; if it stands for a missing id, {hint}')
    top = int(np.argmax(counts))
    if role == 'user' and top not in named and counts[top] > max(HEAVY * len(codes), least):
        percent = 100 * counts[top] / len(codes)
        notes.append(
            f'user {show(ids[top])} has {percent:.0f} % of the records; if they are of many users, '
            f'{hint}'
        )
    return notes
