"""Names out of prose: those that are clear, and none where they are not."""

import time

import pytest

from fame_jax.data.credits import find_cast, find_directors


@pytest.mark.parametrize(
    'text, names',
    [
        ('A drama directed by Ann Lee, known for "Heavy".', ['Ann Lee']),
        ('Directed by the renowned Ann Lee. Released in 1997, it', ['Ann Lee']),
        ('directed by the acclaimed French filmmaker Luc Besson.', ['Luc Besson']),
        ('directed by Ann Lee and Bo Ek. This film', ['Ann Lee', 'Bo Ek']),
        ('directed by and starring Ann Lee, alongside Bo Ek.', ['Ann Lee']),
        ('directed by George A. Romero. The film', ['George A. Romero']),
        ('directed by F.W. Murnau, it', ['F.W. Murnau']),
        ('directed by Edward D. Wood Jr. It is', ['Edward D. Wood Jr.']),
        ('directed by George Tillman, Jr., known', ['George Tillman Jr.']),
        ('directed by Álex de la Iglesia in 1995', ['Álex de la Iglesia']),
        ('directed by Jean-Pierre Jeunet', ['Jean-Pierre Jeunet']),
        ("directed by Jerry O'Connell that", ["Jerry O'Connell"]),
        ('directed by Costa-Gavras, known', []),
        ('directed by an unknown director', []),
        ('directed by the man who made Star Trek (1979)', []),
        ("directed by Ann Lee's brother", []),
        ('directed by "The Big Sleep"', []),
        ('no word of it', []),
        ('x' * 900 + ' directed by Ann Lee', []),
    ],
)
def test_directors(text, names):
    assert find_directors(text) == names


@pytest.mark.parametrize(
    'text, names',
    [
        ('starring Ann Lee, Bo Ek, and Cy Dix. Released', ['Ann Lee', 'Bo Ek', 'Cy Dix']),
        ('features a stellar cast including Ann Lee and Bo Ek, who', ['Ann Lee', 'Bo Ek']),
        ('The main cast includes Ann Lee as Eve Ash and Bo Ek as Dee.', ['Ann Lee', 'Bo Ek']),
        ('The film stars Ann Lee as the queen, and Bo Ek, with x', ['Ann Lee', 'Bo Ek']),
        ('stars Macaulay Culkin as the heir, Richie Rich, alongside', []),
        ('The film stars Macaulay Culkin as the heir, Richie Rich, along', ['Macaulay Culkin']),
        ('cast featuring Ann Lee alongside Bo Ek.', ['Ann Lee', 'Bo Ek']),
        ('cast including Ann Lee, who was in "Bo Ek" and "Cy Dix"', ['Ann Lee']),
        ('featuring a main cast that includes notable actors such as Ann Lee.', ['Ann Lee']),
        ('cast including LL Cool J, and Cuba Gooding Jr., who', ['LL Cool J', 'Cuba Gooding Jr.']),
        ('featuring music by Ann Lee', []),
        ('starring Madonna', []),
        ('starring roles in Star Trek (1979)', []),
        ('cast including Ann Lee, Star Trek (1979)', ['Ann Lee']),
    ],
)
def test_cast(text, names):
    assert find_cast(text) == names


@pytest.mark.parametrize(
    'part', ['A', 'Aa ', 'aa ', 'A. ', "A-'", 'Aa Bb de ', 'starring Aa Bb as ']
)
def test_nothing_takes_long(part):
    began = time.perf_counter()
    find_cast('starring ' + part * 5000)
    find_directors('directed by ' + part * 5000)
    assert time.perf_counter() - began < 1
