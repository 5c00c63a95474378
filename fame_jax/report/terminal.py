"""An explanation as text for a terminal."""

from collections.abc import Mapping
from typing import Any

from fame_jax.report.figures import head_name
from fame_jax.screen import grid, one_line


def explanation(explained: Mapping[str, Any]) -> str:
    """The recommended items, and why, as lines of text.

    Args:
      explained: an Explanation in its JSON form.
    """
    parts = [_recommended(explained)]
    if explained['unknown'] or explained['too_old']:
        parts.append(
            f'Not used from the history: {len(explained["unknown"])} items that the catalogue does '
            f'not contain, {explained["too_old"]} items older than the model’s maximum length.'
        )
    if target := explained['target']:
        rank = f'rank {target["rank"]:,}' if target['rank'] else 'excluded from the list'
        parts.append(f'Next item: {_title(target, 60)}, {rank}.')
    if 'heads' in explained:
        parts += [
            _heads(explained),
            _history(explained),
            'Sum of the gated scores of the heads minus the score: at most '
            f'{explained["identity"]:.1g}.',
        ]
    return '\n\n'.join(parts)


def _title(entry: Mapping[str, Any], most: int = 34) -> str:
    """An item's title, or its id if it has none, in one line."""
    return one_line(entry['title'] or entry['item'], most)


def _recommended(explained: Mapping[str, Any]) -> str:
    """The list, and for each item the past item without which its score falls most."""
    rows = []
    for place, entry in enumerate(explained['recommended'], 1):
        row = [str(place), _title(entry, 44), f'{entry["score"]:.2f}', '']
        if entry.get('without'):
            change, past = min(
                zip(entry['without'], explained['history']), key=lambda pair: pair[0]
            )
            row[3] = f'{_title(past)} ({change:+.2f})'
        rows.append(row)
    if explained['fallback']:
        return grid(['', 'most popular', 'actions'], [row[:3] for row in rows], right=(0, 2))
    return grid(['', 'recommended', 'score', 'falls most without'], rows, right=(0, 2))


def _heads(explained: Mapping[str, Any]) -> str:
    """Each head's own list, and that of equal gate weights."""
    names = [
        f'{head_name(h, head)}: gate {head["share"]:.0%}'
        for h, head in enumerate(explained['heads'])
    ]
    lists = [*(head['top'] for head in explained['heads']), explained['equal_gates']]
    rows = [[str(place), *map(_title, entries)] for place, entries in enumerate(zip(*lists), 1)]
    return grid(['', *names, 'equal gates'], rows, right=(0,))


def _history(explained: Mapping[str, Any]) -> str:
    """For each item of the history: its attention, and each head's router weights there."""
    rows = [
        [
            _title(item),
            f'{explained["carried"][j]:.0%}',
            *(' '.join(f'{w:.2f}' for w in head['positions'][j]) for head in explained['heads']),
        ]
        for j, item in enumerate(explained['history'])
    ]
    names = [f'router of {head_name(h, head)}' for h, head in enumerate(explained['heads'])]
    return grid(['history', 'attention', *names], rows, right=(1,))
