"""Pieces of an HTML page. Whatever comes from data is text: escaped, in one line, its own way on.

A cell, a caption or a heading is finished HTML; `text` and `title` make it of what is not.
"""

import base64
import html
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fame_jax.letters import plain


def text(value: Any, most: int = 200) -> str:
    """Anything as text of one line, in a direction of its own."""
    return f'<bdi>{html.escape(plain(value, most))}</bdi>'


def title(entry: Mapping[str, Any]) -> str:
    """An item by its title or else its id."""
    return text(entry['title'] or entry['item'], 120)


def short(value: float | None) -> str:
    """A figure with four decimals and no leading 0; nothing for None."""
    return '' if value is None else f'{value:.4f}'.replace('0.', '.', 1)


def percent(share: float) -> str:
    """0.123 as 12 %, and small ones with a decimal."""
    return f'{100 * share:.{0 if share >= 0.0995 or not share else 1}f} %'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    names: int = 1,
    kinds: Sequence[str] = (),
    caption: str = '',
) -> str:
    """A table that scrolls within itself.

    Args:
      head: its first line.
      rows: the others, cells without <td>, or `heat` cells.
      names: columns of words; those to the right of them are numbers.
      kinds: the class of each row; none by default.
      caption: above it.
    """
    rows = list(rows)
    lines = [
        f'<tr class="{kind}">{_cells("td", row, names)}</tr>\n'
        for kind, row in zip(kinds or [''] * len(rows), rows)
    ]
    told = f'<caption>{caption}</caption>' if caption else ''
    return (
        f'<div class="wide" tabindex="0"><table>{told}\n'
        f'<thead><tr>{_cells("th", head, names)}</tr></thead>\n'
        f'<tbody>\n{"".join(lines)}</tbody></table></div>'
    )


def _cells(tag: str, row: Sequence[str], names: int) -> str:
    return ''.join(
        cell
        if cell.startswith('<td')
        else f'<{tag} class="{"name" if n < names else "number"}">{cell}</{tag}>'
        for n, cell in enumerate(row)
    )


def heat(share: float, most: float) -> str:
    """A share as a cell, the darker the nearer to the most."""
    shade = 0.6 * min(max(share / most, 0), 1) if most else 0
    return (
        f'<td class="number" style="background:rgba(0,114,178,{shade:.2f})">{percent(share)}</td>'
    )


def bar(shares: Sequence[tuple[str, float]]) -> str:
    """Shares as stretches of one bar, by name."""
    parts = [
        f'<span style="flex:{share:.4f} 1 0;background:rgba(0,114,178,{0.55 if n % 2 else 0.25})">'
        f'{name} {percent(share)}</span>'
        for n, (name, share) in enumerate(shares)
    ]
    return f'<div class="bar">{"".join(parts)}</div>'


def figure(svg: str, name: str, label: str, light: bool = False) -> str:
    """An SVG inside the page, its ids its own.

    Args:
      svg: a whole SVG file of ours.
      name: stands before its ids; another in each figure.
      label: what is to be seen, for who cannot.
      light: it has dark letters and stands on a light card.
    """
    root = ET.fromstring(svg)
    for element in root.iter():
        element.tag = _local(element.tag)
        for unused in [child for child in element if _local(child.tag) == 'metadata']:
            element.remove(unused)
        renamed = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib |= {key: _own(key, value, name) for key, value in renamed.items()}
    told = ET.Element('title')
    told.text = plain(label, 300)
    root.attrib |= {'role': 'img', 'aria-label': told.text}
    root.insert(0, told)
    card = ' class="light"' if light else ''
    return f'<figure{card}>{ET.tostring(root, encoding="unicode")}</figure>'


def _local(name: str) -> str:
    """A name without its namespace, which HTML knows."""
    return name.rpartition('}')[2]


def _own(key: str, value: str, name: str) -> str:
    """An attribute whose ids, and what points to them, begin with the name."""
    if key == 'id':
        return f'{name}-{value}'
    if key == 'href' and value.startswith('#'):
        return f'#{name}-{value[1:]}'
    return value.replace('url(#', f'url(#{name}-')


def picture(svg: str, label: str) -> str:
    """An SVG file as an image on a light card: what is in it cannot touch the page."""
    data = base64.b64encode(svg.encode('utf-8', 'replace')).decode()
    alt = html.escape(plain(label, 300))
    return (
        f'<figure class="light"><img alt="{alt}" src="data:image/svg+xml;base64,{data}"></figure>'
    )
