"""Names from other people's files, made fit to be shown."""


def plain(name: str, most: int) -> str:
    """A name in one line of at most so many letters, without what is no letter in a file."""
    line = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(name)).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + '…'
