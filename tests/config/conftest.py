"""A second value for every flag."""

import pytest

from fame_jax.config import FLAGS


@pytest.fixture(scope='session')
def another():
    """(flag name) -> a valid value of the flag that is not its default."""

    def other_value(name):
        """A valid value of the flag that is not its default."""
        item = FLAGS[name]
        default, about = item.default, item.metadata
        if about.get('separator'):
            known = about.get('names', ('crop_share',))
            return (f'{known[0]}{about["separator"]}7',)
        if name == 'loss_chunk':
            return ('512', '1024')
        if name.endswith('future_targets'):
            return ('1', '.5')
        if about.get('choices'):
            value = next(choice for choice in about['choices'] if choice != default)
            return (value,) if about['kind'] is tuple else value
        if about['kind'] is tuple:
            return ('a b=c', 'é,"f"')
        if about['kind'] is str:
            return {'distributed': 'host:1,0/2', 'model': 'sasrec'}.get(name, 'a b=c,é')
        if about['kind'] is bool:
            return not default
        if default is None:
            return about['kind'](max(about['low'], 0.5))
        if about['kind'] is int:
            return default + 1
        return max(default / 2 or 0.5, about['low'] * 2)

    return other_value
