"""Compares runs: tables on the terminal and one HTML page.

    fame_jax compare runs/a runs/b --against=runs/a --out=pages

A RUN is the folder of a run; of several seeds, which are one run; or of a sweep, whose picture is
shown and whose best setting is compared. Runs of other data or another protocol have a section of
their own. The page is compare.html in the current folder or in --out, or the file --out=NAME.html.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fame_jax import run_dir
from fame_jax.errors import ArgumentParser, UserError, explain_os_errors
from fame_jax.report import comparison_page
from fame_jax.report.comparison import compare

NAME = 'compare.html'


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the page; 2 for a mistake of the user."""
    parser = ArgumentParser(
        prog='fame_jax compare',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, seeds or a sweep')
    parser.add_argument('--against', default='', help='the run against which others are tested')
    parser.add_argument('--out', default='', help='folder for compare.html, or a file .html')
    try:
        options = parser.parse_args(argv)
        path = _output_path(options.out)
        comparison = compare(options.runs, options.against)
        page = comparison_page.page(comparison)
        run_dir.write_text(path, page)
        print(comparison_page.terminal(comparison))
        print(f'\nThe page is {path} ({len(page.encode()) / 2**20:.1f} MiB).')
    except UserError as error:
        print(f'error: {error}'.encode(errors='backslashreplace').decode(), file=sys.stderr)
        return 2
    return 0


def _output_path(out: str) -> Path:
    """The page's path, whose folder is made; a file that is no such page is not replaced."""
    path = Path(out) if out.endswith('.html') else Path(out) / NAME
    with explain_os_errors(f'--out={out}: making {path.parent}', 'choose another --out'):
        if path.is_dir():
            raise UserError(f'--out={out} is a folder with the name of a page; choose another one')
        if path.exists():
            start = path.read_text(encoding='utf-8', errors='replace')[:500]
            if f'content="{comparison_page.GENERATOR}"' not in start:
                raise UserError(
                    f'{path} exists and is no page of this command; choose another --out'
                )
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
