"""The sections of a page on what is inside a model: gate, experts, facets, and single users."""

from collections.abc import Mapping, Sequence
from typing import Any

from fame_jax.markup import bar, figure, heat, percent, picture, table, text, title

Facts = Mapping[str, Any]

SHOWN = 20  # items of a history, the latest


def heads(found: Facts | None) -> str:
    """How much the users of a sample use each head and expert, and a verdict on it.

    Args:
      found: as `facts.use` has it, with svg, a figure of the gate; None for another model.
    """
    if not found:
        return ''
    return (
        f'<p class="verdict">{_verdict(found)}</p>'
        + figure(found['svg'], 'gates', "How the gate's share of each head spreads over users.")
        + table(
            ['', 'mean share', 'largest for', 'entropy of its router', 'of the mean router'],
            [
                [
                    f'head {h}',
                    percent(head['share']),
                    f'{percent(head["top"])} of users',
                    _entropy(head['entropy']),
                    _entropy(head['entropy_of_mean']),
                ]
                for h, head in enumerate(found['heads'], 1)
            ]
            + [['gate', '', '', _entropy(found['entropy']), _entropy(found['entropy_of_mean'])]],
        )
        + _experts(found['heads'])
        + f'<p class="note">{found["users"]:,} test users drawn by the seed, at the last item of '
        'their history. An entropy is in units of its maximum: 1 is an even mix, 0 is one alone. '
        'The mean over users tells how mixed one user is; that of the mean, how evenly all users '
        'together use what there is.</p>'
    )


def _entropy(value: float | None) -> str:
    return 'one choice' if value is None else f'{value:.3f}'


def _verdict(found: Facts) -> str:
    """Are all heads and experts used? In words, with the limits."""
    heads, experts = len(found['heads']), len(found['heads'][0]['experts'])
    dead = [f'head {h + 1}' for h in found['dead_heads']]
    idle = [f'expert {n + 1} of head {h + 1}' for h, n in found['dead_experts']]
    routers = [head['entropy'] for head in found['heads'] if head['entropy'] is not None]
    mixing = [('the gate', found['entropy'])] if found['entropy'] is not None else []
    mixing += [('the routers', sum(routers) / len(routers))] if routers else []
    return ' '.join(
        [
            _count(heads, 'head', dead),
            _count(heads * experts, 'expert', idle),
            f'Dead is a head with a mean share under {100 * found["limits"][0]:.3g} %, or an '
            f'expert with a mean weight under {100 * found["limits"][1]:.3g} % in its head: a '
            'tenth of an equal share.',
            *(
                f'On average over users {name} {_mixing(entropy, name == "the gate")}.'
                for name, entropy in mixing
            ),
        ]
    )


def _count(total: int, name: str, dead: Sequence[str]) -> str:
    if dead:
        are = 'is' if len(dead) == 1 else 'are'
        return f'{len(dead)} of {total} {name}s {are} dead: {", ".join(dead)}.'
    return f'All {total} {name}s are used.' if total > 1 else f'There is one {name}.'


def _mixing(entropy: float, one: bool) -> str:
    """What an entropy in units of its maximum means, in words."""
    kind = 'mix almost evenly' if entropy > 0.95 else 'choose' if entropy < 0.5 else 'lean'
    verb, *rest = kind.split(' ', 1)
    verb = {'mix': 'mixes'}.get(verb, f'{verb}s') if one else verb
    return f'{" ".join([verb, *rest])} (entropy {entropy:.3f} of the maximum)'


def _experts(heads: Sequence[Facts]) -> str:
    """Each expert's mean weight, and for how many users it weighs most."""
    parts = []
    count = len(heads[0]['experts'])
    for key, caption in (
        ('share', "The router's mean weight of each expert"),
        ('top', 'For how many users the expert weighs most'),
    ):
        most = max(expert[key] for head in heads for expert in head['experts'])
        rows = [
            [f'head {h}', *(heat(expert[key], most) for expert in head['experts'])]
            for h, head in enumerate(heads, 1)
        ]
        parts.append(table(['', *(str(n + 1) for n in range(count))], rows, caption=caption))
    return ''.join(parts) if count > 1 else ''


def facets(facts: Facts) -> str:
    """Heads by facets, and the map of the items, where they are known."""
    parts = []
    if facts['facets']:
        label = 'What each head tells of each facet, from 0, chance, to 1, always.'
        parts.append(figure(facts['facets'], 'facets', label, light=True))
    if facts['items']:
        parts.append('<h3>Map of the items</h3>')
        parts.append(picture(facts['items'], 'The items in the plane, coloured by label.'))
    return ''.join(parts)


def cases(facts: Facts) -> str:
    """Single users: what was recommended, by which head, after which history."""
    if not facts['cases']:
        return ''
    known = 'titles' if facts['titles'] else 'ids, for no titles are known'
    attended = (
        '; attended is the attention of all experts, weighted by router and gate'
        if facts['heads']
        else ''
    )
    parts = [
        '<p class="note">Test users, chosen from the sample by the rule in each heading and by '
        f'nothing else. The target, which came next, is <mark>marked</mark>. Items by {known}. The '
        'last column of a history tells how the score of the first recommended item changes when '
        f'the item is left out{attended}.</p>'
    ]
    for n, case in enumerate(facts['cases'], 1):
        found = case['found']
        parts.append(f'<h3>{n}. {case["rule"][0].upper()}{case["rule"][1:]}</h3>')
        parts.append(f'<p>User {text(case["user"], 60)}. {_target(found["target"])}</p>')
        if 'heads' in found:
            gates = [(f'head {h}', head['share']) for h, head in enumerate(found['heads'], 1)]
            parts.append(bar(gates))
        parts += [_lists(found), _history(found)]
    return ''.join(parts)


def _target(target: Facts | None) -> str:
    if not target:
        return ''
    place = f'rank {target["rank"]:,}' if target['rank'] else 'may not be recommended again'
    return f'Next came <mark>{title(target)}</mark>: {place}.'


def _lists(found: Facts) -> str:
    """The list of the whole model, each head's own, and that of equal gates, side by side."""
    lists = {'all together' if 'heads' in found else 'recommended': found['recommended']}
    for h, head in enumerate(found.get('heads', ()), 1):
        lists[f'head {h}: {percent(head["share"])}'] = head['top']
    lists |= {'equal gates': found['equal_gates']} if 'heads' in found else {}
    target = (found['target'] or {}).get('item')
    rows = [
        [str(place), *(_entry(entry, target) for entry in entries)]
        for place, entries in enumerate(
            zip(*lists.values()), 1
        )  # of one length: the same is barred
    ]
    return table(['', *lists], rows, names=1 + len(lists))


def _entry(entry: Facts, target: str | None) -> str:
    return f'<mark>{title(entry)}</mark>' if entry['item'] == target else title(entry)


def _history(found: Facts) -> str:
    """The history, the latest first, and what each item had to do with it."""
    history = found['history']
    first = found['recommended'][0]['without'] if found['recommended'] else None
    columns, head = [[title(item) for item in history]], ['history, the latest first']
    if 'heads' in found:
        shares = [found['carried'], *map(_attended, found['heads'])]
        head += ['attended', *(f'by head {h}' for h in range(1, len(shares)))]
        columns += [[heat(share, max(of_one)) for share in of_one] for of_one in shares]
    if first:
        head.append('no. 1 without it')
        columns.append([f'{change:+.2f}' for change in first])
    rows = list(zip(*columns))[::-1]
    before = len(history) - SHOWN + found['too_old']
    left_out = f' {before:,} before them are left out.' if len(rows) > SHOWN else ''
    return table(head, rows[:SHOWN]) + (f'<p class="note">{left_out}</p>' if left_out else '')


def _attended(head: Facts) -> list[float]:
    """A head's attention by item of the history, all experts weighted by the last router."""
    router_N, attention_NL = head['router'], head['attention']
    return [sum(map(float.__mul__, router_N, of_item)) for of_item in zip(*attention_NL)]
