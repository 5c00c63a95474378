"""The options of the text stage."""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from fame_jax.errors import UserError
from fame_jax.text.facets import INSTANCE


def _option(default: Any, **allowed: Any) -> Any:
    """A dataclass field with its allowed values: `choices`, or `low` and `high`, inclusive."""
    return dataclasses.field(default=default, metadata=allowed)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Options of the facet objective (`facet_objective.py`) and of its labels (`facets.py`).

    Fields:
      epochs: epochs of training.
      learning_rate: Adam's.
      labels_per_step: P, labels in a batch.
      items_per_label: S, items drawn for each label.
      temperature: cosine similarities are divided by it.
      inner_width: hidden units of each head.
      dropout: rate at which coordinates of the text vectors are dropped.
      alternation: 'step': one step for facet 1, one for facet 2, ...; 'epoch': all steps of an
        epoch for facet 1, then those for facet 2, ...; 'sum': each step minimises the sum over
        facets. The heads share no parameters, so the three train the same heads.
      shuffled_labels: whether the items' label sets are permuted among the items, as a control.
      rarest_label: labels with fewer items are dropped; a label with one item gives no positives.
      commonest_label: labels that a larger share of all items has are dropped.

    Raises:
      UserError: when a value is out of range or of another type.
    """

    epochs: int = _option(50, low=0, high=1_000_000)
    learning_rate: float = _option(1e-3, low=0, high=10)
    labels_per_step: int = _option(64, low=2, high=65_536)
    items_per_label: int = _option(4, low=2, high=65_536)
    temperature: float = _option(0.07, low=1e-3, high=100)
    inner_width: int = _option(256, low=1, high=65_536)
    dropout: float = _option(0.1, low=0, high=0.99)
    alternation: str = _option('step', choices=('step', 'epoch', 'sum'))
    shuffled_labels: bool = _option(False)
    rarest_label: int = _option(2, low=1, high=1_000_000_000)
    commonest_label: float = _option(0.3, low=0.001, high=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> 'TextOptions':
        """The options in pairs such as 'epochs=3'; those that are not named keep their defaults.

        Raises:
          UserError: for a text that is no pair, an unknown or repeated name, or a wrong value.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = (part.strip() for part in pair.partition('='))
            if not equals:
                raise UserError(f'--text_options={pair}: write NAME=VALUE, such as epochs=50')
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f'did you mean {close[0]}?' if close else f'choose from {", ".join(fields)}'
                raise UserError(f'--text_options={pair}: there is no option {name!r}; {hint}')
            if name in values:
                raise UserError(f'--text_options: {name} is given twice; remove one')
            values[name] = _convert(fields[name], value)
        return cls(**values)

    def check_heads(self, heads: Sequence[str]) -> None:
        """Refuses to train a head on INSTANCE without dropout, since its two views are then equal.

        Args:
          heads: the facet of each head; see `facets.assign`.
        """
        if self.dropout == 0 and INSTANCE in heads:
            raise UserError(
                f'--text_options=dropout=0 makes the two views of an item equal, and facet '
                f'{INSTANCE} has nothing to learn; set a small rate such as dropout=0.1, or name a '
                'facet for each head'
            )


TYPES = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}


def _convert(field: dataclasses.Field, value: str) -> Any:
    try:
        if field.type is bool:
            return {'true': True, 'false': False}[value.lower()]
        return field.type(value)
    except (ValueError, KeyError) as error:
        raise UserError(
            f'--text_options={field.name}={value}: write {TYPES[field.type]}'
        ) from error


def _check(field: dataclasses.Field, value: Any) -> None:
    given, allowed = f'--text_options={field.name}={value}', field.metadata
    accepted = (int, float) if field.type is float else field.type
    if not isinstance(value, accepted) or isinstance(value, bool) != (field.type is bool):
        raise UserError(f'{given}: give {TYPES[field.type]}')
    if 'choices' in allowed and value not in allowed['choices']:
        raise UserError(f'{given}: choose from {", ".join(allowed["choices"])}')
    if 'low' in allowed and not allowed['low'] <= value <= allowed['high']:
        raise UserError(
            f'{given} is out of range; give a value from {allowed["low"]} to {allowed["high"]}'
        )
