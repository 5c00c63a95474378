"""Who made a film and who plays in it, from prose about it; better no name than a wrong one."""

import re

HEAD = 700  # letters; further on other films' credits begin
UPPER = 'A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪĮİĶĹĻĽŁŃŅŇŌŐŘŚŞŠŢŤŪŮŰŲŹŻŽ'
# A word of a name; the excluded begin the next sentence, or belong to the name before.
WORD = (
    r'(?:(?!(?:Jr|Sr|A(?!\.)|The|This|It|In|Set|With|Released|Starring)\b)'
    rf"(?:(?:[{UPPER}]\.-?)+(?=\s)|(?:[dDlL]['’])?[{UPPER}][\w’'-]*\w|[{UPPER}](?=[\s,])))"
)
PARTICLE = '(?:de|del|della|der|den|di|da|du|la|le|von|van|ten|ter|el|al|y|bin|dos)'
# Two words at least: a lone one is a surname, a role or no name.
NAME = re.compile(
    rf'(?!(?:De|Du|Von)\b){WORD}(?:\s+(?:{PARTICLE}\s+)*{WORD}){{1,4}}(?<!\.)(?:,? (?:Jr|Sr)\.)?'
)
# Praise and trades before a name: small words, of which none begins another clause.
CLAUSE = (
    'who|that|which|whose|as|in|of|for|from|with|on|by|at|and|or|to|his|her|their|is|was|not|other'
    '|such|cast'
)
PRAISE = rf'(?:(?!(?:{CLAUSE})\b)[a-z]+(?:-[a-z]+)*,?\s+){{0,6}}'
NATION = (
    'American|British|English|Scottish|Irish|Welsh|Australian|Canadian|French|German|Italian|Spanish'
    '|Mexican|Japanese|Chinese|Taiwanese|Korean|Indian|Russian|Soviet|Polish|Czech|Danish|Swedish'
    '|Norwegian|Finnish|Dutch|Belgian|Austrian|Hungarian|Serbian|Iranian|Brazilian|Chilean'
)
BEFORE = rf'{PRAISE}(?:(?:{NATION})\s+(?=[a-z]))?{PRAISE}'
DIRECTED = re.compile(rf'\b[Dd]irected by (?:and starring )?{BEFORE}')
STARS = r'(?:film|movie|comedy|drama|thriller|release|[Ii]t|\)"?|\d,) stars'
OPENINGS = '(?:including|includes|featuring|features|comprising|starring|led by)'
CAST = re.compile(
    rf'(?:\b[Ss]tarring|\b[Ff]eaturing|{STARS}|\bcast(?: that)?,?\s+{OPENINGS})\s+'
    rf'{BEFORE}(?:such as\s+)?'
)
ROLE = re.compile(r'\s+as\s+(?:(?! and |\bwith\b)[^,;.()"“])+')
COMMAS = re.compile(r'\s*,?\s+(?:and|&|alongside|along with|with)\s+|\s*,\s+')
ANDS = re.compile(r'\s+(?:and|&)\s+')


def find_directors(text: str) -> list[str]:
    """Returns the names after 'directed by' near the text's beginning, where they are clear."""
    found = DIRECTED.search(text, 0, HEAD)
    return _read_names(text, found.end(), ANDS) if found else []


def find_cast(text: str) -> list[str]:
    """Returns the names after the first 'starring', 'cast including' or the like that has any."""
    lists = (_read_names(text, found.end(), COMMAS) for found in CAST.finditer(text, 0, HEAD))
    return next(filter(None, lists), [])


def _read_names(text: str, at: int, between: re.Pattern) -> list[str]:
    """Returns the names of the list that begins there, as in 'Ann Lee as the queen, and Bo Ek'."""
    names: list[str] = []
    role = parted = None
    while found := NAME.match(text, at):
        # A film's title stands before its year or a quote, and an owner before what is owned.
        if re.search("['’]s$", found[0]) or re.match(r'\s*(?:\(\d|["“”])', text[found.end() :]):
            break
        next_role = ROLE.match(text, found.end())
        # 'Ann Lee as the heroine, Eve Ash' has one actress.
        if role and not parted[0].strip(' ,') and not next_role:
            break
        names.append(found[0].replace(',', ''))  # Gooding, Jr.
        role = next_role
        parted = between.match(text, role.end() if role else found.end())
        if not parted:
            break
        at = parted.end()
    return names
