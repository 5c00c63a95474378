"""FAME+ (arXiv 2601.12301): the texts of items, and the item table that starts from them."""

import dataclasses

from fame_jax.config.fields import canonical, check_fields, field, no_effect, pairs_of
from fame_jax.errors import UserError

TEXT_OPTIONS = {
    **{'epochs': '50', 'learning_rate': '0.001', 'labels_per_step': '64', 'items_per_label': '4'},
    **{'temperature': '0.07', 'inner_width': '256', 'dropout': '0.1', 'alternation': 'step'},
    **{'shuffled_labels': 'false', 'rarest_label': '2', 'commonest_label': '0.3'},
}


@dataclasses.dataclass(frozen=True)
class Text:
    """Item texts (FAME+), facets, and how the item table is initialised."""

    items: str = field(
        '',
        "File of the items' texts, facets and titles: JSON lines, CSV, movies.dat, ... Empty: the "
        "known data set's own.",
    )
    text_fields: tuple[str, ...] = field(
        (), "Fields that make an item's text, in order. Empty: all known ones."
    )
    facets: tuple[str, ...] = field(
        (),
        'A facet for each head: brand, category2, leaf_category, categories, genres, decade, '
        'director, cast, or a column. a+b merges two; instance makes each item its own label. '
        'Missing facets are instance; surplus ones are merged. Empty: those of synthetic data.',
    )
    text_encoder: str = field(
        'tfidf',
        'tfidf (hashed words, truncated SVD), the folder of a BERT-like sentence encoder, or an '
        '.npy whose row 0 is padding, followed by the items in the order of dataset/ids.json.',
    )
    text_options: tuple[str, ...] = field(
        tuple(f'{name}={value}' for name, value in TEXT_OPTIONS.items()),
        'The facet objective. alternation: step, epoch or sum. Labels of fewer than rarest_label '
        'items, or of a larger share of them than commonest_label, are dropped. shuffled_labels '
        'permutes the labels, as a control.',
        separator='=',
        names=tuple(TEXT_OPTIONS),
    )
    item_init: str = field(
        'random', 'Initial item table: random, text (from the stage text), or an .npy of its rows.'
    )
    item_scale: float = field(
        0.08, 'Root mean square of coordinates of rows from texts.', low=1e-6, high=100
    )
    unseen_items: str = field(
        'trained',
        'Rows of items without training interactions: trained as negatives, which moves them away '
        'from all users, or kept as initialised.',
        choices=('trained', 'kept'),
    )
    text_path: float = field(
        0.0,
        'Probability that a training step takes an item from a trained linear map of its frozen '
        'text vector (DenseRec) instead of its row; needs the stage text. 0: no map.',
        low=0,
        high=0.99,
    )
    text_path_below: int = field(
        1,
        'Items with fewer training actions always come from the map of --text_path; 1: those '
        'without any.',
        low=0,
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range or a flag without effect."""
        check_fields(self)
        default = Text()
        if not self.text_path and self.text_path_below != default.text_path_below:
            raise no_effect(
                f'text_path_below={self.text_path_below}', 'text_path=0', 'add --text_path=0.3'
            )
        of_texts = ('text_fields', 'text_encoder') * (not self.text_path)
        for name in (*of_texts, 'facets', 'options'):
            if self.item_init != 'text' and getattr(self, name) != getattr(default, name):
                flag = name.replace('options', 'text_options')
                raise no_effect(flag, f'item_init={self.item_init}', 'add --item_init=text')
        if self.item_init == 'random' and self.item_scale != default.item_scale:
            raise no_effect(
                f'item_scale={self.item_scale:g}', 'item_init=random', 'add --item_init=text'
            )
        if self.item_init == 'random' and self.unseen_items != 'trained':
            raise UserError(
                f'--unseen_items={self.unseen_items} keeps random rows; initialise them from texts '
                'with --item_init=text'
            )
        if self.options['dropout'] == '0' and 'instance' in self.facets:
            raise UserError(
                '--text_options=dropout=0 makes the two views of the facet instance equal; give '
                'it a small value such as 0.1'
            )

    @property
    def uses_texts(self) -> bool:
        """Whether the model needs the stage text."""
        return self.item_init == 'text' or self.text_path > 0

    @property
    def options(self) -> dict[str, str]:
        """All options of the facet objective by name, as texts."""
        given = pairs_of(self, 'text_options')
        return TEXT_OPTIONS | {name: canonical(value) for name, value in given.items()}
