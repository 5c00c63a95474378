"""Which interactions are read, how they are filtered, and how much of a history a model sees."""

import dataclasses

from fame_jax.config.fields import (
    canonical,
    check_fields,
    check_value,
    field,
    no_effect,
    pairs_of,
)
from fame_jax.errors import UserError

# Default, least and greatest value of each option of the synthetic data.
SYNTHETIC = {
    'users': (4000, 1, 10_000_000),
    'items': (1000, 20, 10_000_000),
    'facets': (2, 1, 64),
    'values': (8, 2, 1000),
    'seed': (0, 0, 2**63 - 1),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """The data set of a run."""

    dataset: str = field(
        'synthetic',
        'toys, beauty, sports, scientific, ml-1m, ml-100k, ml-20m, ml-1m-full, lastfm, foursquare, '
        'beauty-2014, sports-2014, toys-2014, yelp, retailrocket, diginetica, h-and-m, synthetic, '
        'or a file of interactions.',
    )
    data_dir: str = field(
        '', 'Folder of known data sets. Empty: $FAME_JAX_DATA, then the cache folder.', binds=''
    )
    prepared: str = field('', 'Folder of another run whose prepared data set is used.')
    columns: tuple[str, ...] = field(
        (),
        'Columns of the file, such as user:customer,item:sku,time:bought_at,rating:stars, or '
        'their positions in a file without a header. The others are guessed. time:- takes the '
        "file's order; item_file_id is the item in the file of --items.",
        separator=':',
        names=('user', 'item', 'time', 'rating', 'item_file_id'),
        pair_binds={'item_file_id': 'text'},  # it does not change how the log is read
    )
    min_rating: float = field(0.0, 'Interactions with a lower rating are dropped.', low=0)
    k_core: int = field(
        5, 'Users and items with fewer interactions are dropped, repeatedly; 0: none.', low=0
    )
    max_user_actions: int = field(
        0, 'Latest interactions that are kept of each user; 0: all.', low=0
    )
    duplicates: str = field(
        'keep',
        'Interactions of equal user, item and time: keep, or drop all but the first.',
        choices=('keep', 'drop'),
    )
    synthetic: tuple[str, ...] = field(
        tuple(f'{name}={default}' for name, (default, *_) in SYNTHETIC.items()),
        'Size and seed of the generated data: users, items, planted facets, values of a facet.',
        separator='=',
        names=tuple(SYNTHETIC),
    )
    max_length: int = field(
        50, 'Latest items of a history that a model sees.', low=1, high=100_000, binds='training'
    )
    long_histories: str = field(
        'split',
        'Training on histories over max_length: split into windows, or the last window.',
        choices=('split', 'last'),
        binds='training',
    )

    # A split binds what is trained, and not the prepared data, which several splits can share.
    split: str = field(
        'leave_one_out',
        "Targets: each user's last items, or the items after a moment that is the same for all "
        'users; training then sees nothing at or after it.',
        choices=('leave_one_out', 'time'),
        binds='run',
    )
    split_at: str = field(
        '0.9',
        'The moment of --split=time: a share of all interactions by time, or a date such as '
        '1998-03-01 (UTC). Validation is chosen the same way before it.',
        binds='run',
    )
    split_targets: str = field(
        'last',
        "Targets of --split=time: each user's last item, or successive: every item, each after "
        'all before it.',
        choices=('last', 'successive'),
        binds='run',
    )

    def __post_init__(self):
        """Gives equal shares one spelling: .90 is 0.9."""
        if isinstance(self.split_at, str):
            object.__setattr__(self, 'split_at', canonical(self.split_at))

    def validate(self) -> None:
        """Raises UserError for a value out of range or a flag without effect."""
        check_fields(self)
        for name in ('split_at', 'split_targets'):
            value = getattr(self, name)
            if self.split != 'time' and value != type(self).__dataclass_fields__[name].default:
                raise no_effect(f'{name}={value}', f'split={self.split}', 'add --split=time')
        for name, value in self.synthetic_options.items():
            default, low, high = SYNTHETIC[name]
            check_value(f'synthetic={name}', value, {'kind': int, 'low': low, 'high': high})
            if value != default and self.dataset != 'synthetic':
                raise no_effect(
                    f'synthetic={name}={value}',
                    f'dataset={self.dataset}',
                    'add --dataset=synthetic',
                )
        if self.columns and self.dataset == 'synthetic' and not self.prepared:
            raise no_effect(f'columns={self.columns[0]}', 'dataset=synthetic', 'add --dataset=FILE')

    @property
    def column_names(self) -> dict[str, str]:
        """The given columns by role: user, item, time, rating, item_file_id."""
        return pairs_of(self, 'columns')

    @property
    def synthetic_options(self) -> dict[str, int]:
        """Users, items, facets, values and seed of the synthetic data."""
        options = {name: default for name, (default, *_) in SYNTHETIC.items()}
        for name, value in pairs_of(self, 'synthetic').items():
            try:
                options[name] = int(value)
            except ValueError as error:
                raise UserError(f'--synthetic={name}={value}: give a whole number') from error
        return options
