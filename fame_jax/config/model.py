"""Which model is trained, and its options; None is the default of the model's class.

models/registry.py checks their names and values against the class, which alone has their defaults.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from fame_jax.config.fields import canonical, check_fields, field, pairs_of
from fame_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """A model by name, and its options; the defaults are those of its class."""

    model: str = field(
        'fame',
        'fame, fame_bert4rec, sasrec, gru4rec, bert4rec, core, cl4srec, duorec, iclrec, '
        'atten_mixer, msgifsr, miasrec, bsarec, causal_bsarec, tvrec, causal_tvrec, hstu, esasrec, '
        'branched_sasrec, branched_bsarec, branched_tvrec, branched_fame, last_item, history_mean, '
        'or a class of your own as package.module:Class.',
    )
    reading: str = field(
        '',
        'A named set of options. paper: FAME as its paper reads, with new parts random, no '
        'residual and no scaling.',
    )
    width: int | None = field(
        None, 'Width D of items and hidden states.', kind=int, low=1, high=65_536
    )
    num_blocks: int | None = field(
        None, 'Transformer blocks; FAME replaces the last.', kind=int, low=1, high=1000
    )
    num_heads: int | None = field(
        None, "Heads H of each block, FAME's facets.", kind=int, low=1, high=1024
    )
    num_experts: int | None = field(
        None, 'Experts N of each head; 1: without experts.', kind=int, low=1, high=4096
    )
    dropout: float | None = field(
        None, 'Rate on input, attention weights and sublayers.', kind=float, low=0, high=0.99
    )
    positions: str | None = field(
        None,
        "relative: a bias per head and distance; start: a table indexed from a history's start; "
        'end: from its end (bsarec).',
        kind=str,
        choices=('relative', 'start', 'both', 'end'),
    )
    similarity: str | None = field(None, 'Of query and item.', kind=str, choices=('cosine', 'dot'))
    temperature: float | None = field(
        None, 'Divisor of cosine similarities.', kind=float, low=1e-4, high=100
    )
    model_options: tuple[str, ...] = field(
        (),
        'More options, NAME=VALUE; NAME= takes back that of a flag file. The error for a wrong '
        'name lists them.',
        separator='=',
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range or an option that has a flag of its own."""
        check_fields(self)
        for name, value in pairs_of(self, 'model_options').items():
            if name in FLAGS_OF_THEIR_OWN:
                raise UserError(f'--model_options={name}={value}: use --{name}={value}')

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, by name; those of model_options as texts."""
        common = {name: getattr(self, name) for name in COMMON}
        given = {name: value for name, value in common.items() if value is not None}
        return given | pairs_of(self, 'model_options')

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same model with these options and no others."""
        pairs = {name: v for name, v in options.items() if name not in FLAGS_OF_THEIR_OWN}
        return dataclasses.replace(
            self,
            **{name: options.get(name) for name in COMMON},
            model_options=tuple(f'{name}={canonical(value)}' for name, value in pairs.items()),
        )


COMMON = tuple(item.name for item in dataclasses.fields(Model) if item.default is None)
FLAGS_OF_THEIR_OWN = (*COMMON, 'max_length', 'dtype')
