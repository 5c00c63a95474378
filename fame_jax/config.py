"""Every choice of a run, once: its name, its default, its unit; the flags are made from it."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fame_jax.errors import UserError, explain_os_errors
from fame_jax.recipes import RECIPES

# Those that make a run, and those that make use of one.
MAKING = ('prepare', 'text', 'pretrain', 'finetune', 'evaluate')
STAGES = (*MAKING, 'recommend', 'explain', 'export', 'report')


# Models that grow out of a backbone.
FAMES = ('fame', 'fame_bert4rec')


def _field(default: Any, help: str, **about: Any) -> Any:
    """A field of Config; `about` may hold choices, low and high (inclusive), runtime, section."""
    return dataclasses.field(default=default, metadata={'help': help, **about})


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, flat and frozen. A `runtime` field does not change what the run computes."""

    stages: tuple[str, ...] = _field(
        tuple(stage for stage in MAKING if stage != 'text'),
        'What to do, in this order; a stage that the workdir holds finished is skipped. text, of '
        'FAME+, comes after prepare; the last four make use of a trained run.',
        choices=STAGES,
        runtime=True,
        section='The run',
    )
    workdir: str = _field(
        '', 'Folder of everything the run leaves behind; empty: runs/DATASET_MODEL.', runtime=True
    )
    seed: int = _field(
        0, 'Seed of initialisation, order, dropout and negatives.', low=0, high=2**32 - 1
    )

    dataset: str = _field(
        'synthetic',
        "toys, beauty, sports, scientific, ml-1m, ml-100k, ml-20m, synthetic, or a file's path.",
        section='Data',
    )
    data_dir: str = _field(
        '', 'Where known data sets lie; empty: $FAME_JAX_DATA, then the cache folder.', runtime=True
    )
    user_column: str = _field('', 'Column of the user in a log; empty: guess.')
    item_column: str = _field('', 'Column of the item in a log; empty: guess.')
    time_column: str = _field('', 'Column of the time in a log; empty: guess, else file order.')
    rating_column: str = _field('', 'Column of the rating in a log; empty: guess when needed.')
    min_rating: float = _field(0.0, 'Ratings below it are not actions; 0: all are.', low=0)
    k_core: int = _field(
        5, 'Users and items keep at least so many actions, to a fixed point; 0: off.', low=0
    )
    synthetic_users: int = _field(4000, 'Users of the synthetic world.', low=1, high=10_000_000)
    synthetic_items: int = _field(1000, 'Items of the synthetic world.', low=20, high=10_000_000)
    synthetic_facets: int = _field(2, 'Planted facets (M) of the synthetic world.', low=1, high=64)
    synthetic_values: int = _field(8, 'Values of each planted facet.', low=2, high=1000)
    synthetic_seed: int = _field(0, "Seed of the synthetic world, apart from the run's.", low=0)
    max_length: int = _field(
        50, 'Items of a history that a model sees, the latest ones.', low=1, high=100_000
    )
    long_histories: str = _field(
        'split',
        'Training on a history over max_length: split in windows end to end, or its last window.',
        choices=('split', 'last'),
    )

    items: str = _field(
        '',
        "File of the items' texts and facets: JSON lines, CSV, movies.dat, ...; empty: the data "
        "set's own.",
        section='Item text (FAME+)',
    )
    item_id_column: str = _field('', "Column of the item's id in that file; empty: guess.")
    text_fields: tuple[str, ...] = _field(
        (), "Fields that make an item's text, in order; empty: all that are known."
    )
    facets: tuple[str, ...] = _field(
        (),
        'What head 1, 2, ... shall tell apart: brand, category2, leaf_category, categories, '
        'genres, decade, director, cast, or a column; a+b is both in one; instance: each item by '
        'itself. Fewer facets than heads: the others get instance; more: the first are merged. '
        'Empty: the planted ones of the synthetic world.',
    )
    rarest_label: int = _field(2, 'Labels that fewer items hold are dropped.', low=1)
    commonest_label: float = _field(
        0.3, 'Labels that a larger share of the items hold are dropped.', low=0.001, high=1
    )
    shuffled_labels: bool = _field(False, 'Labels are dealt to the items anew: a control.')
    text_encoder: str = _field(
        'tfidf',
        'tfidf (hashed words, truncated SVD), the folder of a BERT-like sentence encoder, or an '
        '.npy with a row for the padding, then one an item, in the order of dataset/ids.json.',
    )
    text_cache: str = _field(
        '', 'Folder of encoded texts; empty: in the cache folder.', runtime=True
    )
    text_design: str = _field(
        'independent',
        "independent: an MLP a head, and the item's vector is their outputs side by side; shared: "
        "one linear map makes the item's vector, and the heads are W_f.",
        choices=('independent', 'shared'),
    )
    text_alternation: str = _field(
        'step',
        "Facets take turns by step or by epoch; sum: one step on the facets' summed losses.",
        choices=('step', 'epoch', 'sum'),
    )
    text_epochs: int = _field(50, 'Epochs of the facet objective.', low=0, high=1_000_000)
    text_learning_rate: float = _field(1e-3, 'Adam, facet objective.', low=0, high=10)
    text_labels_per_step: int = _field(64, 'Labels in a batch (P).', low=2, high=65_536)
    text_items_per_label: int = _field(4, 'Items of each (S).', low=2, high=65_536)
    text_temperature: float = _field(0.07, 'Of the contrast.', low=1e-3, high=100)
    text_inner_width: int = _field(256, "independent: of the heads' MLPs.", low=1, high=65_536)
    text_dropout: float = _field(0.1, 'Rate, on the text vectors.', low=0, high=0.99)
    text_decorrelation: float = _field(0.0, 'Weight of the decorrelation of heads.', low=0)
    text_orthogonality: float = _field(
        0.0, 'shared: weight of the squared overlap of the W_f.', low=0
    )
    item_init: str = _field(
        'random',
        "The item table starts random, from the text stage's vectors (text), or from an .npy with "
        'the same rows.',
    )
    item_scale: float = _field(
        0.08, "Root mean square of a row's coordinates then.", low=1e-6, high=100
    )
    item_training: str = _field(
        'trained',
        'trained; frozen: the table stays as it starts; added: frozen, and a trained table by id '
        'is added to it.',
        choices=('trained', 'frozen', 'added'),
    )
    unseen_items: str = _field(
        'trained',
        'Rows of items that no training history holds: trained, as negatives alone, which pushes '
        'them away from everybody; or kept as they start, which is for rows that start from texts.',
        choices=('trained', 'kept'),
    )

    model: str = _field(
        'fame',
        'fame, or fame_bert4rec, is fine-tuned from its backbone; another model is trained by '
        '--stages=pretrain, and brings the defaults of its own paper (recipes.py).',
        choices=('fame', 'fame_bert4rec', *(name for name in RECIPES if name not in FAMES)),
        section='Model',
    )
    width: int = _field(64, 'D, width of items and hidden states.', low=1, high=65_536)
    num_blocks: int = _field(2, 'Transformer blocks; FAME replaces the last.', low=1, high=1000)
    num_heads: int = _field(2, 'H, heads of each block; the facets of FAME.', low=1, high=1024)
    inner_multiple: int = _field(
        4, 'Inner width of the feed-forward in units of D.', low=1, high=64
    )
    activation: str = _field(
        'gelu', "Of the backbone (FFN' is always ReLU, eq. 7).", choices=('gelu', 'relu')
    )
    dropout: float = _field(
        0.5, 'Rate, on the input sum, attention weights and both sublayers.', low=0, high=0.99
    )
    positions: str = _field(
        'relative',
        "relative: a bias per head and distance; start: a table from the history's start; or both.",
        choices=('relative', 'start', 'both'),
    )
    similarity: str = _field('cosine', 'Between the query and an item.', choices=('cosine', 'dot'))
    temperature: float = _field(0.07, 'Cosine similarities are divided by it.', low=1e-4, high=100)
    tied_items: bool = _field(True, 'Items are scored by the table they are read from (eq. 9).')
    attention_bias: bool = _field(True, 'Biases in query, key and value (eqs. 12, 13 have none).')
    attention_scale: str = _field(
        'head',
        'Logits are divided by sqrt(K) (head, eq. 14) or sqrt(D) (model, eq. 3).',
        choices=('head', 'model'),
    )

    reading: str = _field(
        'warm',
        'warm: surgery keeps the pre-trained function nearly; paper: the paper read literally '
        '(new parts random, no residual, no scaling). Sets the defaults of this section.',
        choices=('warm', 'paper'),
        section='The FAME block',
    )
    num_experts: int = _field(
        8, 'N, experts in each head; 1 is FAME without MoE.', low=1, high=4096
    )
    routing: str = _field(
        'outputs',
        "What the router of a head's experts reads: what they gathered (outputs, eq. 16), or the "
        "position's hidden state (inputs), which is known before they attend.",
        choices=('outputs', 'inputs'),
    )
    active_experts: int = _field(
        0,
        'Experts of a head that count at a position, those of largest weight; 0: all. Where '
        '--routing=inputs the others do not attend, which saves their work.',
        low=0,
        high=4096,
    )
    balance_weight: float = _field(
        0.0,
        "Of the experts' balance beside the loss, so that all of them come to be chosen; such as "
        '.01 (arXiv 2101.03961).',
        low=0,
        high=1000,
    )
    attention_dropout: float = _field(
        -1.0,
        "Rate on the block's attention weights; -1: --dropout, as everywhere.",
        low=-1,
        high=0.99,
    )
    attention: str = _field(
        'einsum',
        'einsum, or fused: jax.nn.dot_product_attention, which drops no attention weights.',
        choices=('einsum', 'fused'),
    )
    remat: str = _field(
        'none',
        'experts: they attend one after another, and again in the backward pass, so that the '
        'weights of one are held and not of all; less memory, and on a CPU also less time where '
        'heads times experts are many.',
        choices=('none', 'experts'),
    )
    attention_residual: str = _field(
        'norm',
        'norm: x + f, LayerNorm, split in heads, as in the backbone; slice: head h adds slice h of '
        'x; none: f alone (eqs. 7, 17).',
        choices=('norm', 'slice', 'none'),
    )
    output_projection: str = _field(
        'drop',
        "W_O after the heads: drop (as eqs. 15-17), or keep the backbone's, which mixes heads.",
        choices=('drop', 'keep'),
    )
    expert_init: str = _field(
        'upcycle',
        'Experts start as the pre-trained W_Q plus noise, or random.',
        choices=('upcycle', 'random'),
    )
    expert_noise: float = _field(0.02, 'Deviation of that noise.', low=0, high=10)
    facet_init: str = _field(
        'slices',
        'W_f starts as the selector of slice h of the item, or random.',
        choices=('slices', 'random'),
    )
    facet_learned: bool = _field(True, 'W_f is trained (eq. 9); false: it stays as it starts.')
    gate_scale: str = _field(
        'heads',
        'Gate weights are multiplied by H, so that equal gates leave the slices as they are, or 1.',
        choices=('heads', 'one'),
    )
    ffn_shared: bool = _field(True, "One FFN' for all heads (4.2.3), or one each (4.4.2).")

    hidden_width: int = _field(
        128, 'gru4rec: width of the state.', low=1, high=65_536, section='Baselines'
    )
    cloze_rate: float = _field(0.2, 'bert4rec: share of items to guess.', low=0.001, high=1)
    item_dropout: float = _field(
        0.2, 'core, atten_mixer, miasrec: rate on items.', low=0, high=0.99
    )
    crop_share: float = _field(0.6, 'cl4srec, iclrec: share of a history kept.', low=0, high=1)
    mask_share: float = _field(0.3, 'cl4srec, iclrec: share of a history masked.', low=0, high=1)
    reorder_share: float = _field(
        0.6, 'cl4srec, iclrec: share of a history shuffled.', low=0, high=1
    )
    contrast_weight: float = _field(
        0.1, 'cl4srec, duorec, iclrec: of the contrast beside the loss.', low=0, high=1000
    )
    contrast_temperature: float = _field(1.0, 'Of that contrast.', low=1e-3, high=1000)
    contrast_anchors: int = _field(
        128, 'Histories of a step that are contrasted at the most.', low=2, high=1_000_000
    )
    intents: int = _field(256, 'iclrec: clusters of histories.', low=1, high=1_000_000)
    intent_weight: float = _field(0.1, 'iclrec: of the contrast with them.', low=0, high=1000)
    levels: int = _field(
        7, "atten_mixer: queries, of a history's last 1, 2, ... items.", low=1, high=1000
    )
    pooling_norm: float = _field(4.0, 'atten_mixer: p of its pooling.', low=1, high=64)
    order: int = _field(1, 'msgifsr: items in its longest units.', low=1, high=64)
    entmax_alpha: float = _field(1.5, 'miasrec: 1 softmax, 1.5 entmax, 2 sparsemax.', low=1, high=2)
    highest_weight: float = _field(
        0.9, 'miasrec: of the highest score beside the mean.', low=0, high=1
    )

    loss: str = _field(
        'ce',
        'ce: softmax over the catalogue (eq. 18); bce: one uniform negative or more; sampled: '
        'softmax over the target and uniform negatives.',
        choices=('ce', 'bce', 'sampled'),
        section='Loss',
    )
    num_negatives: int = _field(
        1, 'bce: per position; sampled: per step, shared by its positions.', low=1, high=10_000_000
    )
    negatives: str = _field(
        'uniform',
        'sampled: each item alike; or in proportion to its training actions plus one (popularity), '
        'each negative weighed by the inverse of its probability, which estimates ce.',
        choices=('uniform', 'popularity'),
    )
    chunk_tokens: int = _field(
        -1,
        'ce: tokens at a time; 0: all of a step; -1: what suits the device, which is 128 on a CPU, '
        'and as many as have a GiB of logits elsewhere, where starting kernels is what takes time.',
        low=-1,
    )
    chunk_items: int = _field(
        0,
        'ce: items at a time; 0: all of them. At a million items and more, such as 1024 beside 512 '
        'tokens on a CPU, and 16384 on a GPU: what they take is all that is taken beside the table '
        'and its gradient.',
        low=0,
    )
    loss_positions: str = _field(
        'all', 'Positions that are trained, of each window of a history.', choices=('all', 'last')
    )

    packed: bool = _field(
        True, 'Several histories to a row; false: one, padded to max_length.', section='Training'
    )
    row_length: int = _field(64, 'Positions (L) in a packed row.', low=1, high=1_000_000)
    rows_per_step: int = _field(8, 'Rows (B) in a step.', low=1, high=1_000_000)
    pretrain_epochs: int = _field(60, 'Most epochs of the backbone.', low=0, high=1_000_000)
    finetune_epochs: int = _field(60, 'Most epochs of FAME.', low=0, high=1_000_000)
    patience: int = _field(
        5, 'Epochs without a better validation NDCG@20 before a stage ends.', low=1
    )
    finetune_from: str = _field(
        'pretrain',
        'Start of FAME: the pre-trained backbone through surgery, or scratch.',
        choices=('pretrain', 'scratch'),
    )
    backbone_from: str = _field(
        '', 'Folder of another run whose finished backbone is taken instead of pre-training.'
    )
    learning_rate: float = _field(1e-3, 'Adam, pre-training.', low=0, high=10)
    finetune_learning_rate: float = _field(1e-3, 'Adam, fine-tuning.', low=0, high=10)
    adam_b2: float = _field(0.999, "Adam's second decay.", low=0, high=0.999999)
    weight_decay: float = _field(0.0, 'Decoupled weight decay.', low=0, high=10)
    dtype: str = _field(
        'float32',
        'Of activations; parameters, softmax and losses stay float32.',
        choices=('float32', 'bfloat16'),
    )
    random_bits: str = _field(
        'threefry',
        'Generator of dropout and negatives: threefry is alike on all devices, rbg may be faster.',
        choices=('threefry', 'rbg'),
    )
    steps_per_dispatch: int = _field(
        8,
        'Steps that a device takes by itself before it is told more; the result is the same to the '
        'bit. Models that see each prefix by itself take one.',
        low=1,
        high=1_000_000,
        runtime=True,
    )
    checkpoint_every: int = _field(
        0, 'Steps between checkpoints inside an epoch; 0: at its end alone.', low=0, runtime=True
    )
    checkpoint_seconds: float = _field(
        10.0,
        'An epoch that ends sooner than this after the last checkpoint leaves none, unless it is '
        'the last: where epochs are short, saving each would take longer than training it.',
        low=0,
        runtime=True,
    )

    eval_users: int = _field(
        1024, 'Users ranked at a time.', low=1, high=1_000_000, runtime=True, section='Judging'
    )
    eval_items: int = _field(
        0,
        'Items scored at a time when users are ranked, by each device; 0: all that it has, or '
        'where their scores would take more than 256 MiB, as many as take 16 MiB.',
        low=0,
        runtime=True,
    )

    histories: str = _field(
        '',
        'recommend, explain: file with a history a line, {"user": "ann", "items": ["7", "12"]} or '
        '["7", "12"], the oldest item first; .gz too. Empty: the users of the data set.',
        runtime=True,
        section='Using a trained run',
    )
    recommendations: str = _field(
        '',
        'recommend: what to write, .jsonl or .parquet; empty: WORKDIR/recommendations.jsonl.',
        runtime=True,
    )
    top_k: int = _field(20, 'Length of each list.', low=1, high=1_000_000, runtime=True)
    filter_seen: bool = _field(
        True, 'The items of a history are not recommended to it.', runtime=True
    )
    allow_items: str = _field(
        '', 'File with an item a line: these alone may be recommended.', runtime=True
    )
    deny_items: str = _field(
        '', 'File with an item a line: these may not be recommended.', runtime=True
    )
    titles: str = _field(
        '',
        "File of the items' titles, in the forms of --items; empty: --items, or what lies beside "
        'the data set.',
        runtime=True,
    )
    user: str = _field(
        '',
        'explain: a user of the data set, whose last item is then to be guessed; empty: the first.',
        runtime=True,
    )
    explanation: str = _field(
        '',
        'explain: what to write, without .json and .svg; empty: WORKDIR/explanation.',
        runtime=True,
    )
    export: str = _field('', 'export: folder to write; empty: WORKDIR/export.', runtime=True)
    report: str = _field('', 'report: page to write; empty: WORKDIR/report.html.', runtime=True)

    progress: str = _field(
        'auto',
        'bar, lines (one an epoch), none; auto: a bar on a terminal, lines elsewhere.',
        choices=('auto', 'bar', 'lines', 'none'),
        runtime=True,
        section='Screen and machine',
    )
    data_parallel: int = _field(
        1,
        'Devices that share the rows of a step, and the histories that are judged or recommended '
        'to.',
        low=1,
        high=1_000_000,
        runtime=True,
    )
    model_parallel: int = _field(
        1,
        'Devices that share the item table, by items, in training, judging and recommending; '
        'explain, export and report take one.',
        low=1,
        high=1_000_000,
        runtime=True,
    )
    coordinator: str = _field(
        '',
        'host:port of the first process, where a run has several; the same command for all of them '
        'but for --process.',
        runtime=True,
    )
    num_processes: int = _field(1, 'Processes of the run.', low=1, high=100_000, runtime=True)
    process: int = _field(0, 'Which of them this is.', low=0, high=100_000, runtime=True)
    compilation_cache: str = _field(
        '', "Folder of XLA's persistent compilation cache; empty: none.", runtime=True
    )
    profile: str = _field(
        '',
        'Folder for a trace of some dispatches of each stage, for XProf or ui.perfetto.dev; empty: '
        'none.',
        runtime=True,
    )


# What makes the vectors of --item_init=text.
TEXT = (
    *('items', 'item_id_column', 'text_fields', 'facets', 'rarest_label', 'commonest_label'),
    *('shuffled_labels', 'text_encoder', 'text_design', 'text_alternation', 'text_epochs'),
    *('text_learning_rate', 'text_labels_per_step', 'text_items_per_label', 'text_temperature'),
    *('text_inner_width', 'text_dropout', 'text_decorrelation', 'text_orthogonality'),
)

# What the stages take that make use of a run; it is no part of the run.
USING = (
    *('histories', 'recommendations', 'top_k', 'filter_seen', 'allow_items', 'deny_items'),
    *('titles', 'user', 'explanation', 'export', 'report'),
)

# Models that learn to fill gaps, and models that no other loss fits.
CLOZE = ('bert4rec', 'fame_bert4rec')
PREFIXES = ('msgifsr', 'miasrec')  # that see each prefix by itself
OWN_LOSS = (*CLOZE, *PREFIXES)

# Models whose losses meet the item table a part at a time, wherever the parts are.
SHARED_TABLE = ('fame', 'sasrec', 'gru4rec', 'atten_mixer', 'cl4srec', 'duorec', 'iclrec')
# Stages that several processes can do together.
TOGETHER = ('prepare', 'pretrain', 'finetune', 'evaluate')

# The paper's FAME block read literally, section 4.4.2: what is not named as kept is new and random.
PAPER_READING = {
    'attention_residual': 'none',
    'output_projection': 'drop',
    'expert_init': 'random',
    'facet_init': 'random',
    'gate_scale': 'one',
}


def fields() -> dict[str, dataclasses.Field]:
    """The fields of Config by name, in their order."""
    return {field.name: field for field in dataclasses.fields(Config)}


def parse(argv: Sequence[str]) -> Config:
    """Reads the command line, over the flags of the run that its workdir already holds.

    A value is taken from the command line (or a flag file it names), else, if it defines the run,
    from the workdir's flags.cfg, else from --reading, else from --model's recipe, else from the
    field's default.

    Args:
      argv: arguments without the program's name.

    Raises:
      UserError: on an unknown flag, a value out of range, or flags of another run.
    """
    given = _given(argv, 'the command line')
    stored = {}
    if given.get('workdir'):
        path = Path(given['workdir']) / 'flags.cfg'
        with explain_os_errors(f'--workdir={given["workdir"]}', 'choose another folder'):
            there = path.is_file()
        if there:
            stored = {n: v for n, v in _read_stored(path).items() if not is_runtime(n)}
            _refuse_other_run(given, stored)
    reading = given.get('reading', stored.get('reading'))
    preset = PAPER_READING if reading == 'paper' else {}
    recipe = RECIPES.get(given.get('model', stored.get('model', 'fame')), {})
    config = Config(**{**recipe, **preset, **stored, **given})
    if not config.workdir:
        name = f'{Path(config.dataset).name.split(".")[0]}_{config.model}'
        return parse([*argv, f'--workdir={Path("runs") / name}'])
    check(config)
    return config


def check(config: Config) -> None:
    """Refuses values that cannot be run.

    Raises:
      UserError: names the flag, its value and what would do.
    """
    for name, field in fields().items():
        _check_value(name, getattr(config, name), field.metadata)
    if not config.stages:
        raise UserError(f'--stages names no stage; give one or more of {", ".join(STAGES)}')
    if config.model != 'gru4rec' and config.width % config.num_heads:
        raise UserError(
            f'--width={config.width} does not divide into --num_heads={config.num_heads} heads; '
            'make the width a multiple of the heads'
        )
    packed = config.packed and config.model not in PREFIXES
    if packed and config.row_length < config.max_length:
        raise UserError(
            f'--row_length={config.row_length} is shorter than a history of --max_length='
            f'{config.max_length}; raise the one or lower the other'
        )
    if config.model not in FAMES and 'finetune' in config.stages:
        raise UserError(
            f'--model={config.model} has nothing to fine-tune; use '
            '--stages=prepare,pretrain,evaluate'
        )
    pretrained = 'pretrain' in config.stages
    if config.model in FAMES and pretrained and config.finetune_from == 'scratch':
        raise UserError(
            '--finetune_from=scratch uses no backbone; use --stages=prepare,finetune,evaluate'
        )
    _check_devices(config)
    _check_text(config)
    _check_baseline(config)
    if config.backbone_from and config.model not in FAMES:
        raise UserError(f'--backbone_from is for FAME and not for --model={config.model}; leave it')
    if config.backbone_from and 'pretrain' in config.stages:
        raise UserError(
            f'--backbone_from={config.backbone_from} stands for pre-training; use '
            '--stages=prepare,finetune,evaluate'
        )
    if config.loss == 'sampled' and config.num_negatives < 16:
        raise UserError(
            f'--num_negatives={config.num_negatives} are shared by all positions of a step where '
            '--loss=sampled; use some hundreds, such as 256'
        )
    if config.negatives != 'uniform' and config.loss != 'sampled':
        raise UserError(
            f'--negatives={config.negatives} does nothing where --loss={config.loss}; add '
            '--loss=sampled, or leave it out'
        )
    _check_experts(config)
    if config.expert_init == 'upcycle' and config.num_experts > 1 and config.expert_noise == 0:
        raise UserError(
            '--expert_noise=0 makes all experts of a head the same for ever; '
            'give it a small value such as 0.02'
        )


def _check_experts(config: Config) -> None:
    """Refuses what the FAME block cannot do."""
    if config.active_experts > config.num_experts:
        raise UserError(
            f'--active_experts={config.active_experts} are more than --num_experts='
            f'{config.num_experts}; use 0 for all'
        )
    if config.balance_weight and config.active_experts in (0, config.num_experts):
        raise UserError(
            f'--balance_weight={config.balance_weight} does nothing where all experts are active; '
            'add --active_experts=2, or leave it'
        )
    if not (config.attention_dropout == -1 or config.attention_dropout >= 0):
        raise UserError(
            f'--attention_dropout={config.attention_dropout} is no rate; use -1 for that of '
            '--dropout, or 0 to 0.99'
        )
    dropped = config.dropout if config.attention_dropout < 0 else config.attention_dropout
    if config.model in FAMES and config.attention == 'fused' and dropped:
        raise UserError(
            '--attention=fused cannot drop attention weights; add --attention_dropout=0'
        )


def _check_devices(config: Config) -> None:
    """Refuses a division among devices and processes that cannot be."""
    if config.rows_per_step % config.data_parallel:
        raise UserError(
            f'--rows_per_step={config.rows_per_step} does not divide among --data_parallel='
            f'{config.data_parallel} devices; make it a multiple'
        )
    if config.model_parallel > 1 and config.model not in SHARED_TABLE:
        raise UserError(
            f'--model_parallel={config.model_parallel} is not for --model={config.model}, whose '
            f'loss needs the whole table; it is for {", ".join(SHARED_TABLE)}'
        )
    if bool(config.coordinator) != (config.num_processes > 1):
        raise UserError(
            f'--coordinator={config.coordinator or "(none)"} and --num_processes='
            f'{config.num_processes}: several processes need both'
        )
    if config.process >= config.num_processes:
        raise UserError(
            f'--process={config.process}: there are {config.num_processes}, and they count from 0'
        )
    alone = [stage for stage in config.stages if stage not in TOGETHER]
    if config.num_processes > 1 and alone:
        raise UserError(
            f'the stage {alone[0]} is for one process; leave --coordinator and --num_processes'
        )


def _check_text(config: Config) -> None:
    """Refuses flags of FAME+ that would do nothing, or no good."""
    asked = [name for name in TEXT if getattr(config, name) != fields()[name].default]
    if config.item_init != 'text' and (asked or 'text' in config.stages):
        what = f'--{asked[0]}' if asked else 'the stage text'
        raise UserError(
            f'--item_init={config.item_init} makes no use of {what}; add --item_init=text'
        )
    if config.item_init == 'random':
        for name in ('item_training', 'unseen_items'):
            if getattr(config, name) != 'trained':
                raise UserError(
                    f'--{name}={getattr(config, name)} holds rows that start at random; give them '
                    'content with --item_init=text'
                )
    if config.unseen_items == 'kept' and config.item_training == 'frozen' and config.tied_items:
        raise UserError('--unseen_items=kept does nothing where --item_training=frozen; leave it')
    if config.text_design == 'shared' and config.facet_init != 'slices':
        raise UserError(
            f'--facet_init={config.facet_init} does nothing where --text_design=shared brings its '
            'own W_f; leave it'
        )
    if config.text_design == 'independent' and config.text_orthogonality:
        raise UserError('--text_orthogonality is of --text_design=shared; leave it')
    instances = config.facets and len(config.facets) < config.num_heads
    if config.text_dropout == 0 and (instances or 'instance' in config.facets):
        raise UserError(
            '--text_dropout=0 makes the two views of the facet instance the same; '
            'give it a small value such as 0.1'
        )


def _check_baseline(config: Config) -> None:
    """Refuses what a model cannot do."""
    if config.model in OWN_LOSS and config.loss != 'ce':
        raise UserError(
            f'--loss={config.loss} is not for --model={config.model}, which has a loss of its own; '
            'leave it out'
        )
    if config.model in OWN_LOSS and config.loss_positions != 'all':
        raise UserError(
            f'--loss_positions={config.loss_positions} does nothing where --model={config.model}; '
            'leave it out'
        )
    if config.entmax_alpha not in (1, 1.5, 2):
        raise UserError(f'--entmax_alpha={config.entmax_alpha}: choose 1, 1.5 or 2')
    if config.model not in CLOZE:
        return
    if config.positions != 'start':
        raise UserError(
            f'--positions={config.positions} tells earlier from later, and --model={config.model} '
            'looks both ways; use --positions=start'
        )
    if config.packed and config.row_length < config.max_length + 1:
        raise UserError(
            f'--row_length={config.row_length} is shorter than --max_length={config.max_length} '
            'items and the one to guess; raise the one or lower the other'
        )


def is_runtime(name: str) -> bool:
    """Whether a field may change from command to command of one run."""
    return bool(fields()[name].metadata.get('runtime'))


def differences(config: Config, stored: Config) -> list[str]:
    """Fields, by name and both values, in which two runs are not the same run."""
    return [
        f'--{name}={show(getattr(config, name))} (there: {show(getattr(stored, name))})'
        for name in fields()
        if not is_runtime(name) and getattr(config, name) != getattr(stored, name)
    ]


def read(path: Path) -> Config:
    """The Config in a run's flags.cfg.

    Raises:
      UserError: when the file cannot be read or holds what no flag is called.
    """
    return Config(**_read_stored(path))


def text(config: Config) -> str:
    """A flag file that repeats the run, one flag a line."""
    lines = []
    for name, field in fields().items():
        if 'section' in field.metadata:
            lines += ['', f'# {field.metadata["section"]}']
        lines.append(f'--{name}={show(getattr(config, name))}')
    return '\n'.join(lines[1:]) + '\n'


def help_text() -> str:
    """What --help prints: each flag with its default, its choices and one sentence."""
    lines = [
        'usage: python -m fame_jax.main --flagfile=experiments/toys.cfg [--flag=value ...]',
        'Later flags win; a workdir remembers the flags of its run.',
    ]
    for name, field in fields().items():
        about = field.metadata
        if 'section' in about:
            lines += ['', f'{about["section"]}:']
        choices = f' ({"|".join(about["choices"])})' if about.get('choices') else ''
        lines += [f'  --{name}={show(field.default)}{choices}', f'      {about["help"]}']
    return '\n'.join(lines)


def show(value: Any) -> str:
    """A value as a flag file and the results have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ','.join(value) if isinstance(value, tuple) else str(value)


def _given(arguments: Sequence[str], where: str) -> dict[str, Any]:
    """The values of the flags that `arguments` name."""
    values = flags.FlagValues()
    # absl keeps these two on its global flags only, and a flag file may include another.
    flags.DEFINE_string('flagfile', '', 'Flags from a file.', flag_values=values)
    flags.DEFINE_string('undefok', '', 'Not used.', flag_values=values)
    define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        tuple: flags.DEFINE_list,
        str: flags.DEFINE_string,
    }
    for name, field in fields().items():
        kind = type(field.default)
        define[kind](name, None, field.metadata['help'], flag_values=values)
    try:
        rest = values(['fame_jax', *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, fields(), n=1)
        hint = f'did you mean --{close[0]}?' if close else '--help lists them'
        raise UserError(f'{where}: there is no flag --{error.flagname}; {hint}') from error
    except flags.Error as error:
        raise UserError(
            f'{where}: {" ".join(str(error).split())}; --help lists the flags'
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: a flag file is not text in UTF-8: {error.reason}') from error
    except OSError as error:
        raise UserError(
            f'{where}: cannot read the flag file {error.filename}: {error.strerror}'
        ) from error
    if rest:
        raise UserError(f'{where}: "{rest[0]}" is not a flag; flags look like --seed=1')
    return {
        name: type(field.default)(values[name].value)
        for name, field in fields().items()
        if values[name].present
    }


def _read_stored(path: Path) -> dict[str, Any]:
    with explain_os_errors(f'reading {path}'):
        try:
            lines = path.read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not text in UTF-8; it should hold flags') from error
    arguments = [line for line in lines if line.strip() and not line.startswith('#')]
    return _given(arguments, str(path))


def _refuse_other_run(given: dict[str, Any], stored: dict[str, Any]) -> None:
    merged = Config(**{**stored, **given})
    differ = differences(merged, Config(**stored))
    if differ:
        raise UserError(
            f'{given["workdir"]} holds another run: {", ".join(differ)}; '
            'choose another --workdir, or leave those flags out'
        )


def _check_value(name: str, value: Any, about: Any) -> None:
    choices = about.get('choices')
    for one in value if isinstance(value, tuple) else (value,):
        # flags.cfg holds one flag a line, in UTF-8.
        if isinstance(one, str) and one.encode(errors='ignore').decode().splitlines() not in (
            [],
            [one],
        ):
            raise UserError(f'--{name}={one!r} holds a character that a line cannot; rename it')
        if choices and one not in choices:
            close = difflib.get_close_matches(str(one), choices, n=1)
            hint = f'did you mean {close[0]}?' if close else f'choose from {", ".join(choices)}'
            raise UserError(f'--{name}={one}: there is no such value; {hint}')
    low, high = about.get('low'), about.get('high')
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        most = f' and at most {high}' if high is not None else ''
        raise UserError(f'--{name}={value} is out of range; it must be at least {low}{most}')
