"""Mutants: one-line faults that the tests have to find.

    python tests/mutants.py                      all of them
    python tests/mutants.py losses stages/train  those of a folder or file
    python tests/mutants.py 'best epoch by test' one, by its name

Each fault is put into a copy of the package, where the tests named with it are run; it survives if
they pass. The tests first run on an unchanged copy. `mutants_test.py` checks that the text of each
mutant occurs exactly once, so that the table stays current. Not collected by pytest.
"""

import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = ('.git', '.venv', '.*_cache', '.hypothesis', '__pycache__', 'runs', 'build')
# Compiled programs are shared by all copies, and with the other test sessions.
CACHE = {
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'PYTHONDONTWRITEBYTECODE': '1',  # two mutants of a file in one second could share a .pyc
}
LIMIT = 1800  # seconds of one mutant's tests; a fault that makes them hang is found
KILLED, SURVIVED, HANGS = 'killed', 'SURVIVED', 'killed (hangs)'


class Mutant(NamedTuple):
    """A fault.

    Fields:
      name: the fault in words.
      file: below fame_jax/.
      old: a text that occurs once in the file.
      new: the text in its place.
      tests: arguments of pytest, paths below tests/.
      excuse: why it may survive; '' where it may not.
      devices: how many the tests need.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    excuse: str = ''
    devices: int = 1


BEST = 'stages/best_epoch_test.py'
COUNTS = 'stages/counts_test.py'
FLAG = 'stages/every_flag_test.py'
LOSS = 'losses/cross_entropy_test.py'
SAMPLED = 'losses/sampled_test.py'
LABELS = 'losses/labels_test.py'
RANKING = 'evaluation/ranking_test.py'
RECOMMENDER = 'serving/recommender_test.py'
EXPLAIN = 'serving/explain_test.py'
FAME = 'models/fame_test.py'

MUTANTS = [
    # The Python interface.
    Mutant(
        'best seed by test',
        'api.py',
        "run.metrics['validation'][protocol]",
        "run.metrics['test'][protocol]",
        'api_test.py -k best_seed',
    ),
    Mutant(
        'deviation over seeds with ddof 0',
        'api.py',
        'deviations=_over_runs(statistics.stdev',
        'deviations=_over_runs(statistics.pstdev',
        'api_test.py -k best_seed',
    ),
    Mutant(
        'metrics of the first trained stage',
        'api.py',
        "('pretrain', 'finetune') if name in of_stage][-1]",
        "('pretrain', 'finetune') if name in of_stage][0]",
        'api_test.py -k has_metrics',
    ),
    Mutant(
        'evaluate takes the data set for the catalogue',
        'api.py',
        'recommender.model, index_V[data.items], len(ends)',
        'recommender.model, data.items, len(ends)',
        'api_test.py -k another_order',
    ),
    Mutant(
        'fit leaves the seed out',
        'api.py',
        "f'--seed={seed}'",
        "'--seed=0'",
        'api_test.py -k several_seeds',
    ),
    # Settings.
    Mutant(
        'the lowest value is refused',
        'config/fields.py',
        'not value >= low',
        'not value > low',
        'config',
    ),
    Mutant(
        'the highest value is refused',
        'config/fields.py',
        'not value <= high',
        'not value < high',
        'config',
    ),
    Mutant(
        'a pair that is taken back stays',
        'config/flags.py',
        'for pair in before} if value else {}',
        'for pair in before}',
        'config/flags_test.py',
    ),
    Mutant(
        'the recipe before the stored flags',
        'config/flags.py',
        '{**recipe, **kept, **given.values',
        '{**kept, **recipe, **given.values',
        'config stages/settings_test.py',
    ),
    Mutant(
        'a later pair of the command line is lost',
        'config/flags.py',
        'layers = (layer.get(name, ()) for layer in (Config().flat(), kept, given.values))',
        'layers = (layer.get(name, ()) for layer in (Config().flat(), given.values, kept))',
        'config stages/settings_test.py',
    ),
    Mutant(
        'no difference between runs',
        'config/__init__.py',
        "if not _is_same(name, here.get(name, ''), there.get(name, ''))",
        'if False',
        'stages/settings_test.py -k after_training',
    ),
    Mutant(
        'no room for the masked item',
        'config/__init__.py',
        "longest += row_layout == 'masked'",
        'longest += 0',
        'config stages/settings_test.py models/bert4rec_test.py',
    ),
    Mutant(
        'sixteen shared negatives are too few',
        'config/loss.py',
        'negatives < 16',
        'negatives <= 16',
        'config stages/every_flag_test.py -k negatives',
    ),
    Mutant(
        'items of a chunk for its tokens',
        'config/loss.py',
        'return int(self.loss_chunk[0])',
        'return int(self.loss_chunk[1])',
        'config',
    ),
    Mutant(
        'the model of another run is kept',
        'config/flags.py',
        "dropped |= {'model', 'loss', 'training', 'finetune'}",
        'pass',
        'config stages/settings_test.py',
    ),
    # Data.
    Mutant(
        'validation for test',
        'data/split.py',
        "{'validation': Targets(users, starts, stops - 2)}\n"
        "    parts['test'] = Targets(users, starts, stops - 1)",
        "{'validation': Targets(users, starts, stops - 1)}\n"
        "    parts['test'] = Targets(users, starts, stops - 2)",
        'data/dataset_test.py',
    ),
    Mutant(
        'the validation item is trained on',
        'data/split.py',
        'return Split(stops - 2, parts)',
        'return Split(stops - 1, parts)',
        f'{COUNTS} data/dataset_test.py',
    ),
    Mutant(
        'the moment itself is trained on',
        'data/split.py',
        'np.cumsum(times < moment)',
        'np.cumsum(times <= moment)',
        'data/split_test.py -k loop',
    ),
    Mutant(
        'validation is not before the test',
        'data/split.py',
        'earlier = _quantile(before, share) if',
        'earlier = _quantile(times, share / 2) if',
        'data/split_test.py -k loop',
    ),
    Mutant(
        'two splits have one fingerprint',
        'data/dataset.py',
        'if self.time_split is None:\n            return fingerprint',
        'if True:\n            return fingerprint',
        'data/split_test.py -k other_data',
    ),
    Mutant(
        'windows of a split by time are those of leave one out',
        'stages/train.py',
        'options.long_histories, data.split.train_ends',
        'options.long_histories, data.offsets[1:] - 2',
        'stages/time_split_test.py -k windows',
    ),
    Mutant(
        'several histories of a user are shuffled in one place',
        'stages/graph_baseline.py',
        'if (test.starts[1:] < test.ends[:-1]).any():',
        'if False:',
        'stages/time_split_test.py -k by_itself',
    ),
    Mutant(
        'two splits in one table',
        'report/tables.py',
        'if not time_split:\n        return dataset',
        'if True:\n        return dataset',
        'report/tables_test.py -k splits',
    ),
    Mutant(
        'windows without the next target',
        'data/windows.py',
        'starts + max_length + 1)',
        'starts + max_length)',
        'data/windows_test.py',
    ),
    Mutant(
        'the last window is short',
        'data/windows.py',
        'ends - (max_length + 1)',
        'ends - max_length',
        'data/windows_test.py',
    ),
    Mutant(
        'rows in the order of packing',
        'data/epochs.py',
        'row = rng.permutation(row.max() + 1)[row] if len(row) else row',
        'row = row',
        'data/epochs_test.py',
    ),
    Mutant(
        'every seed has one order',
        'data/epochs.py',
        'np.random.default_rng([seed, epoch])',
        'np.random.default_rng([0, epoch])',
        f'{FLAG} -k two_seeds',
    ),
    Mutant(
        'every epoch has one order',
        'data/epochs.py',
        'np.random.default_rng([seed, epoch])',
        'np.random.default_rng([seed, 0])',
        'stages/train_test.py data/epochs_test.py -k order',
    ),
    Mutant(
        'a masked item is the next one',
        'data/epochs.py',
        "own_targets = row_layout == 'masked'",
        'own_targets = False',
        'data/epochs_test.py',
    ),
    Mutant(
        'histories are cut from the start',
        'data/eval_batches.py',
        'index = ends_B[:, None] + np.arange(-width, 0)[None, :]',
        'index = np.minimum(starts_B + width, ends_B)[:, None] + np.arange(-width, 0)[None, :]',
        'data/eval_batches_test.py',
    ),
    Mutant(
        'a rating at the limit is dropped',
        'data/build.py',
        'log.ratings >= min_rating',
        'log.ratings > min_rating',
        f'{FLAG} -k rating_at_the_limit',
    ),
    Mutant(
        'k-core of users alone',
        'data/build.py',
        'good &= (item_counts >= item_least)[items]',
        'good &= True',
        'data/build_test.py',
    ),
    Mutant(
        'a pair may be the position itself',
        'data/same_target_pairs.py',
        'drawn >= rank[index]',
        'drawn > rank[index]',
        'data/same_target_pairs_test.py',
    ),
    Mutant(
        'the best fit is any fit',
        'data/packing.py',
        'space = length + (fitting & -fitting).bit_length() - 1',
        'space = length + fitting.bit_length() - 1',
        'data/packing_test.py',
    ),
    Mutant(
        'a blank next to a quote is a fault',
        'data/records.py',
        '| (byte == QUOTE) | blank',
        '| (byte == QUOTE)',
        'data/delimited_test.py',
    ),
    Mutant(
        'quotes end with a block',
        'data/records.py',
        'np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ inside',
        'np.bitwise_xor.accumulate(quotes.view(np.uint8))',
        'data/delimited_test.py',
    ),
    Mutant(
        'a quote swallows records',
        'data/records.py',
        'if doubtful.any():',
        'if False:',
        'data/delimited_test.py',
    ),
    Mutant(
        'lone quotes are not said',
        'data/records.py',
        'notes=_note_quotes(plain)',
        'notes=()',
        'data/delimited_test.py',
    ),
    Mutant(
        'doubled quotes stay doubled',
        'data/records.py',
        ".str.replace_all('\"\"', '\"', literal=True)",
        '',
        'data/delimited_test.py',
    ),
    Mutant(
        "quotes of RecBole's files enclose fields",
        'data/records.py',
        "if source.kind == 'inter' or b'\"' not in text:",
        "if b'\"' not in text:",
        'data/delimited_test.py',
    ),
    Mutant(
        'empty lines are records',
        'data/delimited.py',
        'kept = ~records.layout.empty',
        'kept = np.ones(len(records.layout.empty), bool)',
        'data/delimited_test.py',
    ),
    Mutant(
        'empty lines are not counted',
        'data/delimited.py',
        'records.layout.lines[int(np.flatnonzero(kept)[record])]',
        'records.layout.lines[record + begin]',
        'data/delimited_test.py data/readers_test.py',
    ),
    Mutant(
        'the first record is a header',
        'data/delimited.py',
        'if not data or _are_names(given, header):',
        'if True:',
        'data/delimited_test.py',
    ),
    Mutant(
        'every line is a history',
        'data/forms.py',
        'repeated = repeated or fields[0] in users',
        'repeated = False',
        'data/forms_test.py',
    ),
    Mutant(
        'items with commas are one item',
        'data/forms.py',
        "if rest and all(items.count(',') and _is_list(items) for items in rest):",
        'if False:',
        'data/forms_test.py',
    ),
    Mutant(
        'a header with missing values below it is data',
        'data/forms.py',
        '(is_number(row[column]) or _is_missing(row[column]))',
        'is_number(row[column])',
        'data/forms_test.py data/delimited_test.py',
    ),
    Mutant(
        'an object over two lines',
        'data/json_lines.py',
        'or any(zeros) or',
        'or',
        'data/json_lines_test.py',
    ),
    Mutant(
        'a late key moves up',
        'data/json_lines.py',
        'if begin > end:',
        'if False:',
        'data/json_lines_test.py',
    ),
    Mutant(
        'dicts of Python are refused',
        'data/json_lines.py',
        'record = _parse_literal(source, number, line)',
        'record = None',
        'data/json_lines_test.py',
    ),
    Mutant(
        'the last of two values of one key is taken',
        'data/json_lines.py',
        'if first.setdefault(name, value) != value:',
        'if False:',
        'data/trials_test.py',
    ),
    Mutant(
        'the first of two times is taken',
        'data/columns.py',
        'if len(good) + len(rivals) == 1:',
        'if good:',
        'data/columns_test.py',
    ),
    Mutant(
        'a time is unused in silence',
        'data/columns.py',
        '    if doubtful:\n        what',
        '    if False:\n        what',
        'data/columns_test.py',
    ),
    Mutant(
        'seconds with many ties are no times',
        'data/columns.py',
        'distinct > 0.5 or ascending or',
        'distinct > 0.5 or',
        'data/columns_test.py',
    ),
    Mutant(
        'one column has two roles',
        'data/columns.py',
        'if other != role and name == chosen[role]:',
        'if False:',
        'data/columns_test.py',
    ),
    Mutant(
        'a coarse time is as good as a fine one',
        'data/columns.py',
        'and not rise[steps == 0].any()',
        '',
        'data/columns_test.py',
    ),
    Mutant(
        'zones have the other sign',
        'data/times.py',
        "(parts.field('2') == '-').cast(pl.Int64) * 2 - 1",
        "1 - (parts.field('2') == '-').cast(pl.Int64) * 2",
        'data/times_test.py',
    ),
    Mutant(
        'half a second is five microseconds',
        'data/times.py',
        "digits.str.pad_end(6, '0')",
        'digits',
        'data/times_test.py',
    ),
    Mutant(
        'units of time are mixed',
        'data/times.py',
        'if sum(counts.values()) * 2 < len(values):',
        'if True:',
        'data/times_test.py',
    ),
    Mutant(
        'dates have no latest year',
        'data/times.py',
        'if values.min() < low or values.max() >= high:',
        'if values.min() < low:',
        'data/times_test.py',
    ),
    Mutant(
        'a birth date is a time',
        'data/names.py',
        'if OTHERS.search(joined):',
        'if False:',
        'data/names_test.py',
    ),
    Mutant(
        'a duration is a time',
        'data/names.py',
        'if set(words) & DURATIONS:',
        'if False:',
        'data/names_test.py',
    ),
    Mutant(
        'a name is as good as an id',
        'data/names.py',
        "'name': 2,",
        "'name': 1,",
        'data/names_test.py data/columns_test.py',
    ),
    Mutant(
        'a rare placeholder is refused',
        'data/placeholders.py',
        'if count > SHARE * len(codes) and count >= least:',
        'if count > SHARE * len(codes):',
        'data/placeholders_test.py',
    ),
    Mutant(
        'placeholders in capitals are ids',
        'data/placeholders.py',
        'name.casefold() in PLACEHOLDERS',
        'name in PLACEHOLDERS',
        'data/placeholders_test.py',
    ),
    Mutant(
        'blanks belong to an id',
        'data/ids.py',
        'clean = ids.str.strip_chars()',
        'clean = ids',
        'data/ids_test.py',
    ),
    Mutant(
        'one whole number makes all ids whole',
        'data/ids.py',
        'clean.str.contains(WHOLE).all()',
        'clean.str.contains(WHOLE).any()',
        'data/ids_test.py data/readers_test.py',
    ),
    Mutant(
        'equal integers are two ids',
        'data/ids.py',
        "(series.rank('dense') - 1)",
        "(series.rank('ordinal') - 1)",
        'data/ids_test.py',
    ),
    Mutant(
        'another line has the missing id',
        'data/ids.py',
        'int(empty.argmax())',
        'int(empty.argmin())',
        'data/ids_test.py',
    ),
    Mutant(
        'one action too few of a heavy user',
        'data/build.py',
        'np.arange(len(users)) >= ends[users] - number',
        'np.arange(len(users)) > ends[users] - number',
        'data/build_test.py',
    ),
    Mutant(
        'a k-core of one round',
        'data/build.py',
        'users, items = users[good], items[good]',
        'return kept',
        'data/build_test.py',
    ),
    Mutant(
        'users by time alone, not by user',
        'data/build.py',
        'return order[sort(users[order])]',
        'return sort(users)',
        'data/build_test.py',
    ),
    Mutant(
        'a 2-core is none without its short users',
        'data/build.py',
        'MIN_LENGTH, max(k_core, 1))',
        'MIN_LENGTH, 1)',
        'data/build_test.py',
    ),
    Mutant(
        'the last of two equal actions stays',
        'data/build.py',
        'repeated[places[order[1:][equal]]]',
        'repeated[places[order[:-1][equal]]]',
        'data/build_test.py',
    ),
    Mutant(
        'repeats of the validation targets',
        'data/card.py',
        "'repeats': repeat_share(data, 'test')",
        "'repeats': repeat_share(data, 'validation')",
        'data/card_test.py',
    ),
    Mutant(
        'held-out actions warm a target',
        'data/card.py',
        'items, _ = data.training_histories()',
        'items = data.items',
        'data/card_test.py',
    ),
    Mutant(
        'eleven followers',
        'data/card.py',
        'FOLLOWERS = 10',
        'FOLLOWERS = 11',
        'data/card_test.py',
    ),
    Mutant(
        'the validation target is a follower',
        'data/card.py',
        'lengths = ends - starts - 3',
        'lengths = ends - starts - 2',
        'data/card_test.py',
    ),
    Mutant(
        'a changed log goes unseen',
        'data/changes.py',
        "if describe_files(path) == card.get('files'):",
        'if True:',
        'stages/prepare_test.py',
    ),
    Mutant(
        'a touched log is another log',
        'data/changes.py',
        "if sources.open_source(path).sha256 == card['sha256']:",
        'if False:',
        'stages/prepare_test.py',
    ),
    Mutant(
        'the first row of the next file',
        'data/parquet.py',
        'if record < count:',
        'if record <= count:',
        'data/parquet_test.py',
    ),
    Mutant(
        'columns of two files have two types',
        'data/parquet.py',
        'if other[name] != kind:',
        'if False:',
        'data/parquet_test.py',
    ),
    Mutant(
        'a folder such as day=3 is a column',
        'data/parquet.py',
        'glob=False, hive_partitioning=False',
        'glob=False, hive_partitioning=True',
        'data/parquet_test.py',
    ),
    Mutant(
        'the first prefix of a window is of the one before',
        'data/epochs.py',
        "np.searchsorted(self.ends, prefix_B, side='right')",
        "np.searchsorted(self.ends, prefix_B, side='left')",
        'data/epochs_test.py',
    ),
    Mutant(
        'rows of padding repeat a prefix',
        'data/epochs.py',
        'np.pad(prefixes, (0, missing), constant_values=-1)',
        'np.pad(prefixes, (0, missing))',
        'data/epochs_test.py',
    ),
    Mutant(
        'every process has the first rows',
        'data/epochs.py',
        'slice(first + start, first + stop)',
        'slice(first, first + stop - start)',
        'data/epochs_test.py',
    ),
    Mutant(
        'seen items end with the row',
        'data/eval_batches.py',
        '_zero_repeats(_last_items(self._items, starts_B, ends_B, seen))',
        '_zero_repeats(_last_items(self._items, starts_B, ends_B, length))',
        'data/eval_batches_test.py',
    ),
    Mutant(
        'batches of any size are kept',
        'data/eval_batches.py',
        '{} if 4 * places <= KEPT_BYTES else None',
        '{}',
        'data/eval_batches_test.py',
    ),
    Mutant(
        'devices do not share a batch evenly',
        'data/eval_batches.py',
        'multiple * max(1, SEEN_PLACES // (multiple * width))',
        'max(1, SEEN_PLACES // width)',
        'data/eval_batches_test.py',
    ),
    Mutant(
        'a repeat is two seen items',
        'data/eval_batches.py',
        'sorted_BS[:, 1:][sorted_BS[:, 1:] == sorted_BS[:, :-1]] = 0',
        'pass',
        'data/eval_batches_test.py',
    ),
    # Losses.
    Mutant(
        'the loss without the maximum',
        'losses/cross_entropy.py',
        'loss_T = max_T + jnp.log(sum_T) - rowwise(query_TD, target_TD)',
        'loss_T = jnp.log(sum_T) - rowwise(query_TD, target_TD)',
        LOSS,
    ),
    Mutant(
        'labels reach into the next history of a row',
        'losses/labels.py',
        'jnp.where(same_BL & (target_BL > 0), moved_BL, 0)',
        'jnp.where(target_BL > 0, moved_BL, 0)',
        LABELS,
    ),
    Mutant(
        'labels do not sum to one',
        'losses/labels.py',
        'share_BLF / jnp.where(total_BL1 > 0, total_BL1, 1)',
        'share_BLF',
        LABELS,
    ),
    Mutant(
        'the target counts among the seen items',
        'losses/labels.py',
        'counts_B1S & other_BQS',
        'counts_B1S',
        LABELS,
    ),
    Mutant(
        'a seen item counts at each of its places',
        'losses/labels.py',
        '(first_BL & (token_BL > 0))[:, None, :]',
        '(token_BL > 0)[:, None, :]',
        LABELS,
    ),
    Mutant(
        'later items of a history count as seen',
        'losses/labels.py',
        'same_BQS & up_to_1QS & counts_B1S',
        'same_BQS & counts_B1S',
        LABELS,
    ),
    Mutant(
        'a seen item counts w more times and not w - 1',
        'losses/labels.py',
        'jnp.log(seen_weight - 1)',
        'jnp.log(seen_weight)',
        LABELS,
    ),
    Mutant(
        'an extra term has no gradient where items come in chunks',
        'losses/chunked.py',
        'scale_T * jnp.exp(log_extra_T - log_sum_T)',
        '0 * scale_T',
        LABELS,
    ),
    Mutant(
        'the gradient of an extra term has no weight',
        'losses/cross_entropy.py',
        '        slope_T = extra_T / sum_T\n',
        '        slope_T = extra_T\n',
        LABELS,
    ),
    Mutant(
        'fine-tuning has the labels of pre-training',
        'config/loss.py',
        "own = self.finetune_future_targets if stage == 'finetune' else ()",
        'own = ()',
        f'config/config_test.py {FLAG}',
    ),
    Mutant(
        'heads are trained on the sum of their losses',
        'models/fame.py',
        'total, weight, term, self.head_loss)',
        'total, weight, (self.num_heads * term[0], term[1]), self.head_loss)',
        'models/fame_test.py -k head',
    ),
    Mutant(
        'a member that has ended goes on',
        'training/members.py',
        'jnp.where(is_live, new, old), new, state)',
        'new, new, state)',
        'training/members_test.py',
    ),
    Mutant(
        'members share the key of the first',
        'training/members.py',
        'jnp.stack([loop.key for loop in loops] + [first.key] * empty)',
        'jnp.stack([first.key] * places)',
        'stages/members_test.py -k is_the_run_of_its_seed',
    ),
    Mutant(
        'members train on the batches of the first',
        'training/members.py',
        'stack_members(blocks + [[]] * empty, numbers)',
        'stack_members([blocks[0]] * places, numbers)',
        'stages/members_test.py -k is_the_run_of_its_seed',
    ),
    Mutant(
        'sums of the first member for all',
        'training/members.py',
        'name: array[:, s] for name',
        'name: array[:, 0] for name',
        'stages/members_test.py -k "is_the_run_of_its_seed and fame"',
    ),
    Mutant(
        'every seed is fine-tuned from the backbone of seed 0',
        'stages/members.py',
        "own = Path(backbone) / f'seed_{seed}'",
        "own = Path(backbone) / 'seed_0'",
        'stages/members_test.py -k from_the_backbone',
    ),
    Mutant(
        'an update keeps the date of the split before',
        'data/append.py',
        "at=card['at'] if at is None else at",
        "at=card['at']",
        'stages/time_split_test.py -k later_date',
    ),
    Mutant(
        'seeds in one program are not packed',
        'stages/members.py',
        ', packs=setup.program.packs',
        '',
        'training/packed_test.py -k group',
    ),
    Mutant(
        'gradients are joined in another order',
        'training/packed.py',
        'return (_join(gradients, 0),)',
        'return (_join(gradients[::-1], 0),)',
        'training/packed_test.py -k gradient',
    ),
    Mutant(
        'rows that stay are packed',
        'stages/train.py',
        "and context.config.text.unseen_items != 'kept'",
        '',
        'training/packed_test.py -k for_a_gpu',
    ),
    Mutant(
        'a folder of seeds names no data',
        'stages/settings.py',
        'next(iter(run_dir.seed_folders(Path(folder))), Path(folder))',
        'Path(folder)',
        'stages/members_test.py -k each_seed_is_fine_tuned',
    ),
    Mutant(
        'the bit of a seen item is that of its neighbour',
        'serving/rows.py',
        '~(1 << item % 8)',
        '~(1 << (item + 1) % 8)',
        'serving/warm_up_test.py serving/recommender_test.py',
    ),
    Mutant(
        'a few histories are padded to the rows of many',
        'serving/recommender.py',
        'return min(FEW_ROWS, self.batch_size)',
        'return self.batch_size',
        'serving/service_batching_test.py -k batches_are',
    ),
    Mutant(
        'the worst setting is the best',
        'stages/sweep.py',
        '(early[name], -statistics.fmean(found[name]))',
        '(early[name], statistics.fmean(found[name]))',
        'stages/sweep_test.py -k best_setting',
    ),
    Mutant(
        'settings in one program have the numbers of the first',
        'training/members.py',
        'numbers = [member.numbers_N for member in members]',
        'numbers = [members[0].numbers_N for member in members]',
        'stages/sweep_test.py -k in_one_program_are',
    ),
    Mutant(
        'halving ends the best',
        'stages/sweep.py',
        'key=lambda n: -value[n])',
        'key=lambda n: value[n])',
        'stages/sweep_test.py -k "halving_ends and loop"',
    ),
    Mutant(
        'a setting is compared by its first seed',
        'stages/sweep.py',
        '[validation_of(context) for context in runs[name]]',
        '[validation_of(context) for context in runs[name][:1]]',
        'stages/sweep_test.py -k have_seeds',
    ),
    Mutant(
        'several kinds of runs share a folder',
        'run_dir.py',
        'if not held or kind in held:',
        'if True:',
        'run_dir_test.py -k one_kind',
    ),
    Mutant(
        'the results are of the seeds of the command alone',
        'stages/members.py',
        'runs = own | {seed: others[seed] for seed in counted}',
        'runs = own',
        'stages/members_test.py -k finished_seeds',
    ),
    Mutant(
        'seeds with other limits count',
        'stages/members.py',
        "if not one.startswith(('--seed=', '--backbone='))",
        'if False',
        'stages/members_test.py -k do_not_count',
    ),
    Mutant(
        'a stage that the model does not have is swept',
        'stages/sweep.py',
        'refuse_idle(flags, model)',
        'refuse_idle({}, model)',
        'stages/sweep_test.py -k cannot_be_swept',
    ),
    Mutant(
        'a setting is found by the name of its folder alone',
        'stages/sweep_settings.py',
        'place = known.get(_key(flags), name)',
        'place = name',
        'stages/sweep_test.py -k numbered_folder',
    ),
    Mutant(
        'settings of earlier commands are forgotten',
        'stages/sweep.py',
        'every = chosen | earlier',
        'every = dict(chosen)',
        'stages/sweep_test.py -k earlier_commands',
    ),
    Mutant(
        'the test over seeds takes users of the first seed',
        'stages/members.py',
        'np.mean(first, axis=0), np.mean(second, axis=0)',
        'first[0], second[0]',
        'stages/members_test.py -k results_are_those',
    ),
    Mutant(
        'the last weights are validated and not their average',
        'training/loop.py',
        'return self.validate(self.weights())',
        'return self.validate(self.state.params)',
        'training/loop_test.py -k average',
    ),
    Mutant(
        'the last weights are kept and not their average',
        'training/loop.py',
        'self.best = copy(self.weights())',
        'self.best = copy(self.state.params)',
        'training/loop_test.py -k average',
    ),
    Mutant(
        'the average begins with its full decay',
        'training/optimizer.py',
        'jnp.minimum(decay, (1 + state.count) / (10 + state.count))',
        'decay',
        'training/optimizer_test.py',
    ),
    Mutant(
        'a parameter that is set between epochs is averaged',
        'training/optimizer.py',
        'for name in params.keys() - frozen}',
        'for name in params.keys()}',
        'training/optimizer_test.py',
    ),
    Mutant(
        'warm-up is as long as one epoch',
        'stages/train.py',
        'round(training.warmup_epochs * num_steps)',
        'num_steps',
        f'{FLAG} -k warmup',
    ),
    Mutant(
        'pre-training has the dropout of fine-tuning',
        'stages/context.py',
        """        if stage == 'pretrain' and model.backbone:
            return model.backbone_module()
        dropout = config.training.finetune_dropout
        return model if dropout is None else model.clone(dropout=dropout)""",
        """        dropout = config.training.finetune_dropout
        model = model if dropout is None else model.clone(dropout=dropout)
        return model.backbone_module() if stage == 'pretrain' and model.backbone else model""",
        FLAG,
    ),
    Mutant(
        'no gradient of the target row',
        'losses/cross_entropy.py',
        'd_item_VD = scatter_targets(d_item_VD, target_T, -query_TD * weight_T[:, None], share_TF)',
        'd_item_VD = d_item_VD',
        LOSS,
    ),
    Mutant(
        'tokens of an overlap count twice',
        'losses/cross_entropy.py',
        'weight = jnp.where(is_new, weight, 0)',
        'weight = weight',
        LOSS,
    ),
    Mutant(
        'the padding is a class',
        'losses/chunked.py',
        'ALL_ITEMS = RowRange(start=1, first_id=1, num_items=None)',
        'ALL_ITEMS = RowRange(start=0, first_id=0, num_items=None)',
        'losses/chunked_test.py losses/cross_entropy_test.py',
    ),
    Mutant(
        'the running sum is not rescaled',
        'losses/chunked.py',
        'sum_T * jnp.exp(max_T - new_T) + more_T',
        'sum_T + more_T',
        'losses/chunked_test.py losses/cross_entropy_test.py',
    ),
    Mutant(
        'the target is a negative of itself',
        'losses/sampled.py',
        'valid_TR = (negative_TR[None, :] if shared else negative_TR) != target_T[:, None]',
        'valid_TR = (negative_TR[None, :] if shared else negative_TR) > 0',
        SAMPLED,
    ),
    Mutant(
        'the correction without the count',
        'losses/sampled.py',
        'log_q + jnp.log(log_q.shape[-1])',
        'log_q',
        SAMPLED,
    ),
    Mutant(
        'the last item is no negative',
        'losses/sampled.py',
        'jax.random.randint(key, shape, 1, num_items + 1, jnp.int32)',
        'jax.random.randint(key, shape, 1, num_items, jnp.int32)',
        SAMPLED,
    ),
    Mutant(
        'no chance for items without actions',
        'losses/sampled.py',
        'np.asarray(count_V[1:], np.int64) + 1',
        'np.asarray(count_V[1:], np.int64)',
        SAMPLED,
    ),
    Mutant(
        'popular draws are off by one',
        'losses/sampled.py',
        "side='right'",
        "side='left'",
        SAMPLED,
    ),
    Mutant(
        'the sum over negatives',
        'losses/sampled.py',
        'mean_T = negative_loss_T / jnp.where(valid_T > 0, valid_T, 1)',
        'mean_T = negative_loss_T',
        SAMPLED,
    ),
    Mutant(
        'an anchor is compared to itself',
        'losses/contrastive.py',
        'compared_BB & ~jnp.eye(len(vector_BK), dtype=bool)',
        'compared_BB',
        'losses/contrastive_test.py',
    ),
    Mutant(
        'the other view is the row before',
        'losses/contrastive.py',
        'len(one_BK), axis=1)',
        '1, axis=1)',
        'losses/contrastive_test.py',
    ),
    Mutant(
        'labels that overlap count as equal',
        'losses/contrastive.py',
        'num_B[:, None] + num_B[None, :] - shared_BB',
        'jnp.minimum(num_B[:, None], num_B[None, :])',
        'losses/contrastive_test.py',
    ),
    Mutant(
        'the target of several queries is the next item',
        'losses/multi_query.py',
        'target = jnp.arange(T), target_T - 1',
        'target = jnp.arange(T), target_T % score_TV.shape[1]',
        'losses/multi_query_test.py',
    ),
    # Models.
    Mutant(
        "no dropout before the facet block's residual",
        'models/fame_block.py',
        'f_BLD = x_BLD + drop(f_BLD)',
        'f_BLD = x_BLD + f_BLD',
        f'{FAME} -k dropping',
    ),
    Mutant(
        "no dropout in FFN'",
        'models/fame_block.py',
        'norm(f_BLHK + drop(dense(inner_BLHK, down_HKK, down_bias_HK)))',
        'norm(f_BLHK + dense(inner_BLHK, down_HKK, down_bias_HK))',
        f'{FAME} -k dropping',
    ),
    Mutant(
        'gates always sum to H',
        'models/fame_block.py',
        "(num_heads if self.gate_scale == 'heads' else 1)",
        'num_heads',
        f'{FAME} -k loop',
    ),
    Mutant(
        'the mean of the experts',
        'models/fame_block.py',
        "f_BLHK = jnp.einsum('BLHN,BLHNK->BLHK', router_BLHN, f_BLHNK)  # (17)",
        'f_BLHK = f_BLHNK.mean(axis=3)',
        f'{FAME} -k loop',
    ),
    Mutant(
        'shares are not renormalised',
        'models/experts.py',
        'return kept_BLHN / kept_BLHN.sum(axis=-1, keepdims=True), pick_BLHAN',
        'return kept_BLHN, pick_BLHAN',
        'models/experts_test.py',
    ),
    Mutant(
        'padding counts for the balance',
        'models/experts.py',
        '(router_BLHN > 0) & real_BL11',
        'router_BLHN > 0',
        'models/experts_test.py',
    ),
    Mutant(
        'upcycled experts are equal',
        'models/fame.py',
        'return copies + noise * jax.random.normal(key, copies.shape, copies.dtype)',
        'return copies',
        'models/surgery_test.py',
    ),
    Mutant(
        'experts and their biases share the noise',
        'models/fame.py',
        "path, key = f'{new}/{name}', jax.random.fold_in(key, 1)",
        "path, key = f'{new}/{name}', key",
        'models/surgery_test.py',
        'both are independent draws of a key that nothing else uses; the shapes differ',
    ),
    Mutant(
        'surgery drops the key bias',
        'models/fame.py',
        "['key_bias', 'value_bias'] if self.attention_bias",
        "['key_bias', 'value_bias'] if False",
        'models/surgery_test.py',
    ),
    Mutant(
        'the balance has no weight',
        'models/fame.py',
        '(balance, 1.0), self.balance_weight)',
        '(balance, 1.0), 1.0)',
        'models/experts_test.py models/fame_test.py models/objective_test.py',
    ),
    Mutant(
        'kept entries are not scaled',
        'models/layers.py',
        'x * (256 / max(kept, 1))',
        'x',
        'models/layers_test.py',
    ),
    Mutant(
        'attention sees the future',
        'models/layers.py',
        'return same_BQS & real_B1S & causal_1QS',
        'return same_BQS & real_B1S',
        'models/layers_test.py',
    ),
    Mutant(
        'attention crosses histories',
        'models/layers.py',
        'return same_BQS & real_B1S & causal_1QS',
        'return real_B1S & causal_1QS & (same_BQS | True)',
        'models/layers_test.py',
    ),
    Mutant(
        'no dropout after attention',
        'models/layers.py',
        'h_BQD = norm(query_input_BQD + drop(mixed_BQD))',
        'h_BQD = norm(query_input_BQD + mixed_BQD)',
        'models/layers_test.py models/sasrec_test.py',
    ),
    Mutant(
        'no dropout of the attention weights',
        'models/layers.py',
        'dropped_BHNQS = drop(weight_BHNQS).astype(value_BSHK.dtype)',
        'dropped_BHNQS = weight_BHNQS.astype(value_BSHK.dtype)',
        'models/layers_test.py models/sasrec_test.py models/fame_test.py',
    ),
    Mutant(
        'no dropout of the input',
        'models/sasrec.py',
        'x_BLD = self.input_dropout(x_BLD, train=train)',
        'x_BLD = x_BLD',
        'models/sasrec_test.py training/step_test.py -k "dropout or golden"',
    ),
    Mutant(
        'the temperature is ignored',
        'models/item_model.py',
        'return (x32 * (inverse / temperature)).astype(x.dtype)',
        'return (x32 * inverse).astype(x.dtype)',
        f'{FLAG} training/step_test.py -k "temperature or golden"',
    ),
    Mutant(
        'dropout and negatives share a key',
        'models/objective.py',
        'dropout_key, negative_key = jax.random.split(key)',
        'dropout_key = negative_key = key',
        'models/objective_test.py training/step_test.py',
        'one key for both is a worse choice but a right loss; golden steps show the change',
    ),
    Mutant(
        'negatives inside the history',
        'models/objective.py',
        'valid_TR = ~in_history(batch, negative_BLR)',
        'valid_TR = (negative_BLR > 0)',
        'models/objective_test.py',
    ),
    Mutant(
        'a term of the loss by its sum',
        'models/objective.py',
        'return total + term_weight * mean * weight, mean',
        'return total + term_weight * mean, mean',
        'models/objective_test.py models/cl4srec_test.py models/duorec_test.py',
    ),
    Mutant(
        'no dropout of items in CORE',
        'models/core.py',
        'x_BLD = self.drop_items(self.embed_items(tokens_BL), train=train)',
        'x_BLD = self.embed_items(tokens_BL)',
        'models/core_test.py',
    ),
    Mutant(
        'BERT4Rec sees only the past',
        'models/bert4rec.py',
        'return earlier_BLL | earlier_BLL.swapaxes(1, 2)',
        'return earlier_BLL',
        'models/bert4rec_test.py',
    ),
    Mutant(
        'a text path for items without a text',
        'models/text_path.py',
        'always_V = has_V & (actions_V < below)',
        'always_V = actions_V < below',
        'models/text_path_test.py',
    ),
    Mutant(
        'a text path for items at the limit of actions',
        'models/text_path.py',
        'always_V = has_V & (actions_V < below)',
        'always_V = has_V & (actions_V <= below)',
        'models/text_path_test.py',
    ),
    Mutant(
        'rare items take their rows in training',
        'models/text_path.py',
        "constants['always'] | (drawn_V & has_text_V)",
        'drawn_V & has_text_V',
        'models/text_path_test.py',
    ),
    Mutant(
        'validation ranks without the text path',
        'stages/train.py',
        'context.fold(params, context.mesh), ' + "'selection'",
        "params, 'selection'",
        'stages/text_runs_test.py -k text_path',
    ),
    Mutant(
        'actions of the text path count the targets of validation and test',
        'stages/context.py',
        'actions_V = np.bincount(trained, minlength=data.num_items + 1)',
        'actions_V = np.bincount(data.items, minlength=data.num_items + 1)',
        'stages/text_runs_test.py -k text_path',
    ),
    Mutant(
        'lists of heads keep the items of the history',
        'stages/top_lists.py',
        'seen = batch.seen_BS if context.selects_masked else batch.seen_BS[:, :0]',
        'seen = batch.seen_BS[:, :0]',
        'stages/evaluate_test.py -k heads',
    ),
    Mutant(
        'active experts are balanced by all',
        'models/fame.py',
        'all_active=self.active_experts in (0, self.num_experts)',
        'all_active=True',
        'models/experts_test.py -k balance',
    ),
    Mutant(
        'positions from the end count from the start',
        'models/bert4rec.py',
        "if self.positions == 'end':",
        "if self.positions == 'nowhere':",
        'models/bert4rec_test.py -k positions_from_the_end',
    ),
    Mutant(
        'last_share masks by the draw too',
        'models/bert4rec.py',
        'drawn_BL &= ~(earlier_BLL & alone_BL[:, :, None]).any(axis=1)',
        'drawn_BL |= (earlier_BLL & alone_BL[:, :, None]).any(axis=1) & False',
        'models/bert4rec_test.py -k alone',
    ),
    Mutant(
        'BERT4Rec learns from all positions',
        'models/bert4rec.py',
        'masked_BL.reshape(-1)[order_T].astype(jnp.float32)',
        'jnp.ones_like(masked_BL.reshape(-1)[order_T], jnp.float32)',
        'models/bert4rec_test.py',
    ),
    Mutant(
        'the state of a GRU crosses histories',
        'models/gru4rec.py',
        'return segments_BL == before_BL',
        'return segments_BL >= 0',
        'models/gru4rec_test.py',
    ),
    Mutant(
        'HSTU adds up weights without a divisor',
        'models/hstu.py',
        'nn.silu(logit_BHQS) / divisor, 0)',
        'nn.silu(logit_BHQS), 0)',
        'models/hstu_test.py',
    ),
    Mutant(
        'HSTU weights the items of other histories',
        'models/hstu.py',
        'jnp.where(mask_BQS[:, None], nn.silu',
        'jnp.where(mask_BQS[:, None] | True, nn.silu',
        'models/hstu_test.py',
    ),
    Mutant(
        'a gate of eSASRec reads what attention has added',
        'models/esasrec.py',
        "dense(name='attention_gate')(x_BQD)",
        "dense(name='attention_gate')(x_BQD + mixed_BQD)",
        'models/esasrec_test.py',
    ),
    Mutant(
        'a recipe keeps the negatives of another loss',
        'config/flags.py',
        'if loss in (None, recipe.get(',
        'if True or loss in (None, recipe.get(',
        'config/flags_test.py',
    ),
    Mutant(
        'CL4SRec without its contrast',
        'models/cl4srec.py',
        'term, self.contrast_weight)',
        'term, 0.0)',
        'models/cl4srec_test.py',
    ),
    Mutant(
        'DuoRec without its contrast',
        'models/duorec.py',
        'total, contrast = add_term(total, weight, term, self.contrast_weight)',
        'total, contrast = add_term(total, weight, term, 0.0)',
        'models/duorec_test.py',
    ),
    Mutant(
        'ICLRec counts its intents twice',
        'models/iclrec.py',
        'self.intent_weight / 2)',
        'self.intent_weight)',
        'models/iclrec_test.py',
    ),
    Mutant(
        'empty clusters go to zero',
        'models/kmeans.py',
        'jnp.where(count_C1 > 0, count_C1, 1), centroid_CD)',
        'jnp.where(count_C1 > 0, count_C1, 1), 0 * centroid_CD)',
        'models/kmeans_test.py',
    ),
    Mutant(
        'MiaSRec by its best query alone',
        'models/miasrec.py',
        'self.highest_weight * u_BQD + (1 - self.highest_weight) * mean_B1D',
        'u_BQD',
        'models/miasrec_test.py',
    ),
    Mutant(
        'a query attends to other nodes',
        'models/session_graph.py',
        'weight_BHQS = jnp.where(link_BQS[:, None], weight_BHQS, 0)',
        'weight_BHQS = weight_BHQS',
        'models/session_graph_test.py',
    ),
    Mutant(
        'a level that is not there has a share',
        'models/msgifsr.py',
        'jnp.where(there_BG, self.level_logit[None], layers.MASKED)',
        'jnp.where(there_BG | True, self.level_logit[None], layers.MASKED)',
        'models/msgifsr_test.py',
    ),
    Mutant(
        'levels are pooled without their factor',
        'models/atten_mixer.py',
        'jnp.where(mask_B1QS, 2 * pooled_BHQS, layers.MASKED)',
        'jnp.where(mask_B1QS, pooled_BHQS, layers.MASKED)',
        'models/atten_mixer_test.py',
    ),
    Mutant(
        'the causal filter of BSARec sees later items',
        'models/bsarec.py',
        'mask_BLL if self.causal else mask_BLL | mask_BLL.swapaxes(1, 2)',
        'mask_BLL | mask_BLL.swapaxes(1, 2)',
        'models/bsarec_test.py',
    ),
    Mutant(
        'BSARec keeps one frequency too few',
        'models/bsarec.py',
        '<= cutoff // 2]',
        '< cutoff // 2]',
        'models/bsarec_test.py',
    ),
    Mutant(
        'a score is not the mean of the branches',
        'models/branches.py',
        'return self.branches**-0.5',
        'return 1.0',
        'models/branches_test.py',
    ),
    Mutant(
        'branches share their dropout',
        'models/branches.py',
        'self.each_branch(objective, params, jax.random.split(key, self.branches))',
        'self.each_branch(objective, params, jax.random.split(key, 1).repeat(self.branches))',
        'models/branches_test.py',
    ),
    Mutant(
        'branches start alike',
        'models/branches.py',
        'return jax.vmap(init)(jax.random.split(key, self.branches))',
        'return jax.vmap(init)(jax.random.split(key, 1).repeat(self.branches))',
        'models/branches_test.py',
    ),
    Mutant(
        'experts of all branches have the noise of the first',
        'models/branches.py',
        'plans = [module.surgery_plan(k) for k in jax.random.split(key, self.branches)]',
        'plans = [module.surgery_plan(key) for _ in range(self.branches)]',
        'models/branches_test.py',
    ),
    Mutant(
        'a head of a branch has a query outside of its branch',
        'models/branches.py',
        "head_RBHSK = jnp.einsum('RBHK,RS->RBHSK', parts['head_BHD'], eye_RR)",
        "head_RBHSK = jnp.einsum('RBHK,RS->RBHSK', parts['head_BHD'], eye_RR * 0 + self.share())",
        'models/branches_test.py',
    ),
    Mutant(
        'places of TV-Rec count from the start of the row',
        'models/tvrec.py',
        'jnp.arange(positions_BL.shape[1])[None, ::-1]',
        'jnp.arange(positions_BL.shape[1])[None]',
        'models/tvrec_test.py',
    ),
    Mutant(
        'the filters of TV-Rec keep their length',
        'models/tvrec.py',
        'mixture_LM, unit(basis_MS))',
        'mixture_LM, basis_MS)',
        'models/tvrec_test.py',
    ),
    Mutant(
        'the loss of a prefix is that of its first column',
        'models/prefix_rows.py',
        'field_BL[:, -1:]',
        'field_BL[:, :1]',
        'models/bsarec_test.py',
    ),
    Mutant(
        'the mean of a history counts its padding',
        'models/pooling.py',
        'mask_BQS.sum(axis=2, keepdims=True)',
        'jnp.ones_like(mask_BQS, int).sum(axis=2, keepdims=True)',
        'models/pooling_test.py',
    ),
    Mutant(
        'the last item is the first of its row',
        'models/pooling.py',
        'return x_BLD[:, -1:] if last else x_BLD',
        'return x_BLD[:, :1] if last else x_BLD',
        'models/pooling_test.py',
    ),
    Mutant(
        'a leaf without a use is dropped silently',
        'models/surgery.py',
        'if missing or left or unfit or unknown:',
        'if missing or unfit or unknown:',
        'models/surgery_test.py',
    ),
    Mutant(
        'a label hides the options of a reading',
        'models/registry.py',
        'if all(values[name] == value for name, value in read.items()):',
        'if any(values[name] == value for name, value in read.items()):',
        'models/registry_test.py',
    ),
    Mutant(
        'an option may be just out of range',
        'models/options.py',
        'option.range.low <= value <= option.range.high',
        'option.range.low - 1 <= value <= option.range.high + 1',
        'models/registry_test.py',
    ),
    # Evaluation.
    Mutant(
        'a tie of the item graph counts for the target',
        'evaluation/item_graph.py',
        'place_V[part_BV.indices[tie_T]] <= place_B[_rows(part_BV, tie_T)]',
        'place_V[part_BV.indices[tie_T]] < place_B[_rows(part_BV, tie_T)]',
        'evaluation/item_graph_test.py',
    ),
    Mutant(
        'items without a path are behind every target',
        'evaluation/item_graph.py',
        'np.where(is_zero_B, as_popular_B - counted_B, 0)',
        'np.where(is_zero_B, 0, 0)',
        'evaluation/item_graph_test.py',
    ),
    Mutant(
        'the item graph has one direction',
        'evaluation/item_graph.py',
        'return (total_VV + total_VV.T).tocsr()',
        'return total_VV.tocsr()',
        'evaluation/item_graph_test.py',
    ),
    Mutant(
        'pairs cross the border of two histories',
        'evaluation/item_graph.py',
        'np.flatnonzero(user_A[distance:] == user_A[:-distance])',
        'np.flatnonzero(user_A[distance:] >= user_A[:-distance])',
        'evaluation/item_graph_test.py',
    ),
    Mutant(
        'a tie counts for the target',
        'evaluation/ranking.py',
        'ahead_BV = (score_BV >= target_score_B1) & is_item_1V',
        'ahead_BV = ((score_BV > target_score_B1) | (id_1V == target_B[:, None])) & is_item_1V',
        f'{RANKING} {BEST}',
    ),
    Mutant(
        'a tie with a seen item',
        'evaluation/ranking.py',
        'seen_ahead_BS = (seen_score_BS >= target_score_B1) & (seen_BS > 0)',
        'seen_ahead_BS = (seen_score_BS > target_score_B1) & (seen_BS > 0)',
        RANKING,
    ),
    Mutant(
        'NaN of another item passes',
        'evaluation/ranking.py',
        'is_nan_B = psum(jnp.sum(jnp.isnan(score_BV) & is_item_1V, axis=1, dtype=jnp.int32)) > 0',
        'is_nan_B = jnp.isnan(target_score_B1[:, 0])',
        RANKING,
    ),
    Mutant(
        'unmasked ranks are the masked ones',
        'evaluation/ranking.py',
        'ranks.unmasked[user_B[is_user_B]] = unmasked_B',
        'ranks.unmasked[user_B[is_user_B]] = masked_B',
        BEST,
    ),
    Mutant(
        'epochs are selected on the test split',
        'stages/context.py',
        "batches['selection'] = batches['validation']",
        "batches['selection'] = batches['test']",
        BEST,
    ),
    Mutant(
        'epochs are selected on a sample of the test split',
        'stages/context.py',
        "self._eval_batches('validation', self.selection_users)",
        "self._eval_batches('test', self.selection_users)",
        'stages/validation_users_test.py',
    ),
    Mutant(
        'epochs are selected on unmasked ranks',
        'evaluation/ranker.py',
        'metrics.metrics(getattr(ranks, protocol)).items()',
        'metrics.metrics(ranks.unmasked).items()',
        BEST,
    ),
    Mutant(
        'a hit at the cut-off is none',
        'evaluation/metrics.py',
        'float(np.mean(rank_U <= k))',
        'float(np.mean(rank_U < k))',
        'evaluation/metrics_test.py',
    ),
    Mutant(
        'the first rank has no full gain',
        'evaluation/metrics.py',
        '1 / np.log2(1 + rank_U), 0)))',
        '1 / np.log2(2 + rank_U), 0)))',
        'evaluation/metrics_test.py',
    ),
    Mutant(
        'cold targets are a group like others',
        'evaluation/groups.py',
        'is_warm_U = count_U > 0',
        'is_warm_U = count_U >= 0',
        'evaluation/groups_test.py',
    ),
    Mutant(
        'a miss may be in the history',
        'evaluation/groups.py',
        '(rank_U > 10) & (rank_U < last_rank)',
        '(rank_U > 10) & (rank_U <= last_rank)',
        'evaluation/groups_test.py',
    ),
    Mutant(
        'each column has its own users',
        'evaluation/significance.py',
        '[2.5, 97.5], axis=0)',
        '[5, 95], axis=0)',
        'evaluation/significance_test.py',
    ),
    Mutant(
        'seeds are one',
        'evaluation/significance.py',
        'return np.mean([ndcg(rank_U, k) for rank_U in ranks], axis=0)',
        'return np.max([ndcg(rank_U, k) for rank_U in ranks], axis=0)',
        'evaluation/significance_test.py',
    ),
    Mutant(
        'heads and facets are matched worst',
        'evaluation/facet_probe.py',
        'linear_sum_assignment(-part_HM)',
        'linear_sum_assignment(part_HM)',
        'evaluation/facet_probe_test.py',
    ),
    Mutant(
        'the Gini index of the next smaller list',
        'evaluation/lists.py',
        'np.arange(1, items + 1) - items - 1',
        'np.arange(1, items + 1) - items',
        'evaluation/lists_test.py',
    ),
    Mutant(
        'users without actions know no item',
        'evaluation/lists.py',
        'np.count_nonzero(np.diff(offsets))',
        '(len(offsets) - 1)',
        'evaluation/lists_test.py',
    ),
    Mutant(
        'a tie is not popular',
        'evaluation/lists.py',
        'count_V >= max(least, 1)',
        'count_V > max(least, 1)',
        'evaluation/lists_test.py',
    ),
    Mutant(
        'actions of an item for its users',
        'evaluation/lists.py',
        'np.unique(user_A * (num_items + 1) + items)',
        'user_A * (num_items + 1) + items',
        'evaluation/lists_test.py',
    ),
    # Training.
    Mutant(
        'every step has one key',
        'training/step.py',
        'step_key = jax.random.fold_in(key, state.step)',
        'step_key = key',
        'training/step_test.py -k dropout',
    ),
    Mutant(
        'the sum is minimised',
        'training/step.py',
        'return loss / jnp.maximum(weight, 1), ',
        'return loss, ',
        'training/step_test.py -k weighted',
    ),
    Mutant(
        'weight decay sees no parameters',
        'training/step.py',
        'optimizer.update(grads, state.optimizer, state.params)',
        'optimizer.update(grads, state.optimizer)',
        'training/step_test.py stages/counts_test.py -k "decay or kept"',
    ),
    Mutant(
        'an equal epoch is the best',
        'training/loop.py',
        'if values[progress.select_on] > progress.best_value:',
        'if values[progress.select_on] >= progress.best_value:',
        'training/loop_test.py',
    ),
    Mutant(
        'every epoch is the best',
        'training/loop.py',
        'if values[progress.select_on] > progress.best_value:',
        'if True:',
        BEST,
    ),
    Mutant(
        'the last parameters are saved as best',
        'training/loop.py',
        '                self.best,\n                dataclasses.asdict',
        '                self.state.params,\n                dataclasses.asdict',
        BEST,
    ),
    Mutant(
        'a resumed stage forgets its best epoch',
        'training/loop.py',
        "self.best = trees['best']",
        "self.best = trees['params']",
        'training/loop_test.py',
    ),
    Mutant(
        'patience is one too long',
        'training/loop.py',
        'progress.stale >= self.limits.patience',
        'progress.stale > self.limits.patience',
        'training/loop_test.py',
    ),
    Mutant(
        'epochs are selected on the hit rate',
        'training/loop.py',
        "SELECT_ON = 'ndcg@20'",
        "SELECT_ON = 'hr@10'",
        'stages/repeats_test.py -k ranking',
    ),
    Mutant(
        'a repeated epoch stays in the log',
        'training/loop.py',
        'self.log.drop_after(self.progress.epoch)',
        'pass',
        'stages/resume_test.py -k every_epoch',
    ),
    Mutant(
        'the sums of an epoch go on',
        'training/loop.py',
        'progress.loss_sum, progress.loss_count = 0.0, 0.0',
        'pass',
        'training/loop_test.py stages/resume_test.py -k "losses or every_epoch"',
    ),
    Mutant(
        'other learning rates are ignored',
        'training/optimizer.py',
        'optimizer = optax.adam(learning_rate)',
        'optimizer = optax.adam(1e-3)',
        f'{FLAG} -k learning_rate',
    ),
    Mutant(
        'Adam forgets its second moment faster',
        'training/optimizer.py',
        'optimizer = optax.adam(learning_rate)',
        'optimizer = optax.adam(learning_rate, b2=0.99)',
        'training/optimizer_test.py',
    ),
    Mutant(
        'no weight decay',
        'training/optimizer.py',
        'weight_decay=weight_decay)',
        'weight_decay=0.0)',
        'training/optimizer_test.py',
    ),
    Mutant(
        'rows are kept before Adam',
        'training/optimizer.py',
        'optax.chain(optimizer, optax.stateless(zero_rows))',
        'optax.chain(optax.stateless(zero_rows), optimizer)',
        'training/step_test.py -k decay',
    ),
    Mutant(
        'the next epoch is laid out twice',
        'training/prefetch.py',
        'self._waiting = {epoch + 1: self._future(epoch + 1)}',
        'self._waiting = {}',
        'training/loop_test.py -k prefetch',
    ),
    Mutant(
        'metrics of other stages are dropped',
        'training/log.py',
        "line.get('stage') != self.stage or line['epoch'] <= epoch",
        "line['epoch'] <= epoch",
        'stages/resume_test.py stages/best_epoch_test.py -k "every_epoch or selected"',
    ),
    # Serving.
    Mutant(
        'items of a tie are not in order',
        'serving/recommender.py',
        "np.argsort(-self.count_V[1:], kind='stable') + 1",
        'np.argsort(self.count_V[1:])[::-1] + 1',
        f'{RECOMMENDER} {COUNTS} -k "popular or stranger"',
    ),
    Mutant(
        'the filter is always on',
        'serving/recommender.py',
        'request.indices if request.filter_seen and i >= 0 else nothing',
        'request.indices if i >= 0 else nothing',
        f'{RECOMMENDER} {BEST} -k "filter or seen"',
    ),
    Mutant(
        'denied items are recommended',
        'serving/recommender.py',
        'indices, more = self.to_indices(deny)',
        'indices, more = self.to_indices([])',
        RECOMMENDER,
    ),
    Mutant(
        'the padding is a candidate',
        'serving/recommender.py',
        'self._all_allowed_V = np.arange(len(self.item_ids)) > 0',
        'self._all_allowed_V = np.arange(len(self.item_ids)) >= 0',
        f'{RECOMMENDER} {EXPLAIN}',
    ),
    Mutant(
        'all rows of a batch have the candidates of the first',
        'serving/recommender.py',
        'if any(request.allowed_V is not allowed_V for request in row_requests):',
        'if False:',
        f'{RECOMMENDER} -k share_batches',
    ),
    Mutant(
        'histories of a job are answered by another version',
        'serving/service/batching.py',
        'same = [job for job in self._jobs if job.recommender is recommender]',
        'same = list(self._jobs)',
        'serving/service_batching_test.py',
    ),
    Mutant(
        'a fault of one request is that of its whole batch',
        'serving/service/batching.py',
        'if len(parts) == 1:',
        'if len(parts):',
        'serving/service_test.py -k faulty',
    ),
    Mutant(
        'a folder is read while it is being copied',
        'serving/service/versions.py',
        'if before.get(found.name) == found.stamp and self._is_new(found):',
        'if self._is_new(found):',
        'serving/service_versions_test.py -k slow_copy',
    ),
    Mutant(
        'an export that was replaced while it was read is served',
        'serving/service/versions.py',
        'if read_digest(found.path) != digest:',
        'if not digest:',
        'serving/service_versions_test.py -k replaced_while',
    ),
    Mutant(
        'the start of a token suffices',
        'serving/service/guard.py',
        'hmac.compare_digest(value, token)',
        'token.startswith(value)',
        'serving/service_test.py -k token',
    ),
    Mutant(
        'a stop does not wait for answers',
        'serving/service/command.py',
        'timeout_graceful_shutdown=STOP_ANSWERS',
        'timeout_graceful_shutdown=0',
        'serving/service_load_test.py -k waits_for_answers',
    ),
    Mutant(
        'similar items include the item',
        'serving/topk.py',
        '(index_1V <= num_items) & (index_1V != item_B[:, None])',
        '(index_1V <= num_items)',
        RECOMMENDER,
    ),
    Mutant(
        'candidates of another shard',
        'serving/topk.py',
        'jax.lax.dynamic_slice_in_dim(allowed_BX, first // 8, width, axis=1)',
        'jax.lax.dynamic_slice_in_dim(allowed_BX, 0 * first, width, axis=1)',
        'parallel/sharded_serving_test.py -k top_items',
        devices=8,
    ),
    Mutant(
        'attention without the router',
        'serving/explain.py',
        "np.einsum('H,HN,HNL->L', share_H, router_HN, attention_HNL)",
        "np.einsum('H,HNL->L', share_H, attention_HNL)",
        EXPLAIN,
    ),
    Mutant(
        'a tie counts for the explained target',
        'serving/explain.py',
        'int(np.sum((score_V >= score_V[item]) & allowed_V))',
        'int(np.sum((score_V > score_V[item]) & allowed_V)) + 1',
        EXPLAIN,
    ),
    Mutant(
        'equal scores in any order',
        'serving/explain.py',
        "np.argsort(-score_V[allowed], kind='stable')",
        'np.argsort(score_V[allowed])[::-1]',
        EXPLAIN,
    ),
    Mutant(
        'equal gates are the gates',
        'serving/explain.py',
        'score_HV.sum(0) * gate_H.mean()',
        'gate_H @ score_HV',
        EXPLAIN,
    ),
    Mutant(
        'the effect with the wrong sign',
        'serving/explain.py',
        '(score_JK[1:] - score_JK[0]).T',
        '(score_JK[0] - score_JK[1:]).T',
        EXPLAIN,
    ),
    Mutant(
        'an export forgets the type of ids',
        'serving/export.py',
        "id_type, filter_seen = ids.get('type', 'str'), card",
        "id_type, filter_seen = 'str', card",
        'serving/export_test.py api_test.py -k "export or id"',
    ),
    Mutant(
        'a changed export is served',
        'serving/export.py',
        'if _sha256(path) != sums.get(name):',
        'if False:',
        'serving/export_test.py',
    ),
    Mutant(
        'frames are read in their order',
        'serving/frames.py',
        "order = np.argsort(_times(frame, time), kind='stable').tolist()",
        'order = range(len(users))',
        'serving/frames_test.py',
    ),
    Mutant(
        'numbers of a list from 0',
        'serving/frames.py',
        "fillvalue=''), 1\n",
        "fillvalue=''), 0\n",
        'serving/frames_test.py serving/answers_test.py',
    ),
    Mutant(
        'True is the id 1',
        'serving/ids.py',
        'isinstance(value, numbers.Integral) and not isinstance(value, bool)',
        'isinstance(value, numbers.Integral)',
        'serving/ids_test.py serving/recommender_test.py',
    ),
    Mutant(
        'a rounded float is an id',
        'serving/ids.py',
        'float(value).is_integer() and abs(value) < exact',
        'float(value).is_integer()',
        'serving/ids_test.py',
    ),
    Mutant(
        'blanks around an id of a request',
        'serving/ids.py',
        'return value.strip()',
        'return value',
        'serving/ids_test.py',
    ),
    Mutant(
        'a history keeps its first items',
        'serving/rows.py',
        'history[-max_length:]',
        'history[:max_length]',
        'serving/recommender_test.py',
    ),
    Mutant(
        'seen items are candidates',
        'serving/rows.py',
        'np.bitwise_and.at(bits_BX, (row, item // 8), ~(1 << item % 8).astype(np.uint8))',
        'pass',
        'serving/warm_up_test.py -k bits',
    ),
    Mutant(
        'lists are half as long',
        'serving/topk.py',
        '1 << (k - 1).bit_length()',
        '1 << (k - 1).bit_length() - 1',
        'serving/warm_up_test.py',
    ),
    Mutant(
        'a head compares whole item vectors',
        'serving/recommender.py',
        'arguments = self.model.item_VD, index_B, self.num_items, facet_DK',
        'arguments = self.model.item_VD, index_B, self.num_items, None',
        'serving/recommender_test.py -k similar_items_by_a_head',
    ),
    Mutant(
        'the number of a head counts from 0',
        'serving/recommender.py',
        'return self.model.facet_HDK[int(by) - 1]',
        'return self.model.facet_HDK[int(by) % len(names)]',
        'serving/recommender_test.py -k similar_items_by_a_head',
    ),
    Mutant(
        'heads of shuffled labels are named',
        'stages/facet_names.py',
        "and text.options['shuffled_labels'] == 'false'",
        '',
        'stages/similar_test.py -k named_only',
    ),
    Mutant(
        'facets are laid over all branches together',
        'stages/facet_names.py',
        'return facets.assign(names, num_heads(module) or len(names)) * num_branches(module)',
        'return facets.assign(names, num_heads(module) or len(names))',
        'stages/text_runs_test.py -k every_branch',
    ),
    Mutant(
        'item vectors of other branches are taken',
        'stages/initialize.py',
        'if (made_heads, made) != (heads, branches):',
        'if made_heads * made != heads * branches:',
        'stages/text_runs_test.py -k number_of_branches',
    ),
    Mutant(
        'facets are matched to heads of all branches together',
        'stages/evaluate.py',
        'known, seed, branches)',
        'known, seed)',
        'stages/text_runs_test.py -k all_branches_with_facets',
    ),
    Mutant(
        'a view of a branch is of the next one',
        'models/branches.py',
        'return self.split(jnp.eye(self.width))',
        'return jnp.roll(self.split(jnp.eye(self.width)), 1, axis=0)',
        'models/branches_test.py -k view',
    ),
    Mutant(
        'an export is written to ONNX with items in their places alone',
        'serving/onnx_model.py',
        'before_B1 + count_BL - 1',
        'jnp.arange(length)[None] + 0 * before_B1',
        'serving/export_test.py -k anywhere',
    ),
    Mutant(
        'rows of the same index are not filled in ONNX',
        'serving/onnx_graph.py',
        'if mode == lax.GatherScatterMode.FILL_OR_DROP:',
        'if False:',
        'serving/onnx_graph_test.py -k outside',
    ),
    Mutant(
        'loops of ONNX run forwards only',
        'serving/onnx_graph.py',
        "in reversed(turns) if params['reverse'] else turns:",
        'in turns:',
        'serving/onnx_graph_test.py -k loop',
    ),
    Mutant(
        'items of a device count from 0',
        'serving/topk.py',
        'return first + column_BK, score_BK',
        'return column_BK, score_BK',
        'parallel/sharded_serving_test.py -k top_items',
        devices=8,
    ),
    # Stages.
    Mutant(
        'every run has seed 0',
        'stages/train.py',
        'jax.random.key(config.run.seed)',
        'jax.random.key(0)',
        f'{FLAG} -k two_seeds',
    ),
    Mutant(
        'both stages share a key',
        'stages/train.py',
        'TRAINED.index(stage))',
        '0)',
        f'{FLAG} -k two_seeds',
    ),
    Mutant(
        'initialisation and dropout share a key',
        'stages/initialize.py',
        'return program(jax.random.fold_in(key, 0))',
        'return program(jax.random.fold_in(key, 1))',
        f'{FLAG} -k two_seeds',
    ),
    Mutant(
        'one order for all seeds',
        'stages/train.py',
        'seed=config.run.seed,',
        'seed=0,',
        f'{FLAG} -k two_seeds',
    ),
    Mutant(
        'fine-tuning at the rate of pre-training',
        'config/training.py',
        "self.learning_rate if stage == 'pretrain' else self.finetune_learning_rate",
        'self.learning_rate',
        f'{FLAG} -k learning_rate',
    ),
    Mutant(
        'fine-tuning for the epochs of pre-training',
        'stages/context.py',
        "getattr(training, f'{stage}_epochs')",
        'training.pretrain_epochs',
        f'{FLAG} -k epochs',
    ),
    Mutant(
        'long histories are always split',
        'stages/train.py',
        'options.max_length, options.long_histories',
        "options.max_length, 'split'",
        f'{FLAG} -k long_histories',
    ),
    Mutant(
        'negatives by all actions',
        'stages/train.py',
        'items, _ = context.data.training_histories()\n        count_V',
        'items = context.data.items\n        count_V',
        f'{COUNTS} -k negatives',
    ),
    Mutant(
        'rows of held-out items are trained',
        'stages/train.py',
        'windows.items_in_windows(make_windows(context), context.data.num_items)',
        'np.bincount(context.data.items, minlength=context.data.num_items + 1) > 0',
        f'{COUNTS} -k kept',
    ),
    Mutant(
        'grown from the last backbone',
        'stages/initialize.py',
        "checkpoints.restore(best=abstract_params(backbone))['best']",
        "checkpoints.restore(params=abstract_params(backbone))['params']",
        BEST,
    ),
    Mutant(
        'the last parameters are evaluated and served',
        'stages/context.py',
        "checkpoints.restore(best=abstract_params(trained))['best']",
        "checkpoints.restore(params=abstract_params(trained))['params']",
        BEST,
    ),
    Mutant(
        'activations are float32 always',
        'stages/context.py',
        "fields['dtype'] = jnp.dtype(config.training.dtype)",
        "fields['dtype'] = jnp.dtype('float32')",
        f'{FLAG} -k dtype',
    ),
    Mutant(
        'the model sees 50 items',
        'stages/context.py',
        "fields['max_length'] = config.data.max_length",
        "fields['max_length'] = 50",
        f'{FLAG} -k max_length',
    ),
    Mutant(
        'the item graph is chosen on test',
        'stages/graph_baseline.py',
        "item_graph.choose(training, split['validation'], users, protocol)",
        "item_graph.choose(training, split['test'], users, protocol)",
        'stages/graph_baseline_test.py',
    ),
    Mutant(
        'the item graph reads held-out actions',
        'stages/graph_baseline.py',
        'item_graph.Training(*data.training_histories(), data.num_items)',
        'item_graph.Training(data.items, data.offsets, data.num_items)',
        'stages/graph_baseline_test.py',
    ),
    Mutant(
        'the item graph of other data is taken',
        'stages/graph_baseline.py',
        "if (card['version'], card['fingerprint']) != (",
        "if (card['version'], None) == (",
        'stages/graph_baseline_test.py',
    ),
    Mutant(
        'the item graph is not ranked anew after shuffling',
        'stages/graph_baseline.py',
        'items=histories.shuffle_items(test.items, test.starts, test.ends)',
        'items=test.items',
        'stages/graph_baseline_test.py',
    ),
    Mutant(
        'popularity counts held-out actions',
        'stages/evaluate.py',
        'metrics.popularity(data.training_histories()[0], data.num_items)',
        'metrics.popularity(data.items, data.num_items)',
        COUNTS,
    ),
    Mutant(
        'unseen targets are seen',
        'stages/evaluate.py',
        'items, _ = data.training_histories()\n    _, ends',
        'items = data.items\n    _, ends',
        COUNTS,
    ),
    Mutant(
        'masked ranks twice',
        'stages/evaluate.py',
        "f'{name}/{split}/{protocol}': getattr(found, protocol)",
        "f'{name}/{split}/{protocol}': found.masked",
        BEST,
    ),
    Mutant(
        'test ranks twice',
        'stages/evaluate.py',
        'ranks = {(stage, split): ranker(params, split) for split in SPLITS}',
        "ranks = {(stage, split): ranker(params, 'test') for split in SPLITS}",
        BEST,
    ),
    Mutant(
        'the backbone is served',
        'stages/open_recommender.py',
        'for stage in reversed(TRAINED) if',
        'for stage in TRAINED if',
        BEST,
    ),
    Mutant(
        'popular items by held-out actions',
        'stages/open_recommender.py',
        'np.bincount(trained, minlength',
        'np.bincount(data.items, minlength',
        COUNTS,
    ),
    Mutant(
        'the explained target is the one before',
        'stages/explain.py',
        'data.offsets[user] : data.offsets[user + 1]].tolist()',
        'data.offsets[user] : data.offsets[user + 1] - 1].tolist()',
        f'{BEST} -k explained',
    ),
    Mutant(
        'one list for all',
        'stages/recommend.py',
        'recommender, source, serving.top_k, filter_seen=serving.filter_seen',
        'recommender, source, serving.top_k, filter_seen=True',
        f'{BEST} -k filter',
    ),
    Mutant(
        'the page shows test histories with their target',
        'stages/report.py',
        'data.items[starts[row] : ends[row]].tolist()',
        'data.items[starts[row] : ends[row] + 1].tolist()',
        'stages/report_test.py -k cases',
    ),
    Mutant(
        'another seed for the texts',
        'stages/text.py',
        'seed=config.run.seed,\n        report',
        'seed=0,\n        report',
        f'{FLAG} -k seed_of_the_texts',
    ),
    Mutant(
        'the fields of a text are ignored',
        'stages/text.py',
        'config.text.text_fields,',
        '(),',
        f'{FLAG} -k text_fields',
    ),
    Mutant(
        'unmasked lists are the masked ones',
        'stages/top_lists.py',
        'batch.seen_BS if masked else batch.seen_BS[:, :0]',
        'batch.seen_BS',
        'stages/repeats_test.py -k lists',
    ),
    Mutant(
        'seen items fill up a list',
        'stages/top_lists.py',
        'np.where(mesh_lib.gather(score_BK) > -np.inf, mesh_lib.gather(item_BK), 0)',
        'np.asarray(mesh_lib.gather(item_BK))',
        'stages/repeats_test.py -k lists',
    ),
    Mutant(
        'a log may change while it is read',
        'stages/prepare.py',
        "if files and changes.describe_files(path) != files['files']:",
        'if False:',
        'stages/prepare_test.py -k "while or changes"',
    ),
    Mutant(
        'flags of a failed prepare stay',
        'stages/prepare.py',
        'path.unlink() if before is None else path.write_bytes(before)',
        'pass',
        'stages/prepare_test.py -k "binds or written"',
    ),
    # Updates.
    Mutant(
        'new items take the numbers of old ones',
        'data/append.py',
        'numbers |= {name: len(known) + number for',
        'numbers |= {name: number for',
        'data/append_test.py -k histories',
    ),
    Mutant(
        'actions that wait are lost',
        'stages/update.py',
        'update_start.read_waiting(before.folder),',
        'append.NO_ACTIONS,',
        'stages/update_test.py -k update_of_an_update',
    ),
    Mutant(
        'the row of a new item is made from a held-out item',
        'stages/update_start.py',
        'trained[:-1] & trained[1:]',
        'trained[:-1] | trained[1:]',
        'stages/update_test.py -k without_an_epoch',
    ),
    Mutant(
        'an update begins with empty moments',
        'training/optimizer.py',
        'news[place] = jax.tree.map(_like, node, news[place])',
        'news[place] = news[place]',
        'training/optimizer_test.py -k carried',
    ),
    Mutant(
        'windows with new actions are a share too',
        'stages/update_start.py',
        'chosen = np.sort(np.concatenate([new, replayed]))',
        'chosen = np.sort(replayed)',
        'stages/update_test.py -k long_window',
    ),
    # Texts.
    Mutant(
        'the padding keeps its text vector',
        'text/item_init.py',
        'items_VD[0] = 0  # padding',
        'pass',
        'text/item_init_test.py',
    ),
    Mutant(
        'rows of texts by their own length',
        'text/item_init.py',
        '* (scale * np.sqrt(items_VD.shape[1]))',
        '* scale',
        'text/item_init_test.py',
    ),
    Mutant(
        'the id of the item file binds how the log was read',
        'config/data.py',
        "pair_binds={'item_file_id': 'text'},",
        'pair_binds={},',
        'config/config_test.py -k id_of_the_item_file',
    ),
    Mutant(
        'a run takes the id of the item file from the run in --prepared',
        'stages/settings.py',
        "in stored.get('columns', ()) if pair.startswith(ITEM_FILE_ID)",
        'in ()',
        'stages/text_runs_test.py -k item_file_of_its_own',
    ),
    Mutant(
        'texts are matched without the column of the log',
        'stages/text.py',
        '**id_columns(config.data.column_names, data.card),',
        '',
        'stages/text_runs_test.py -k texts_and_titles',
    ),
    Mutant(
        'the likelier of two id fields is taken, whatever their ids',
        'text/item_files.py',
        'if more or (likely',
        'if (likely',
        'text/items_test.py -k ids_decide',
    ),
    Mutant(
        'a missing file of items is found when it is read',
        'stages/text_settings.py',
        "if given.values.get('items'):",
        'if False:',
        'stages/text_runs_test.py -k before_the_data_are_prepared',
    ),
    Mutant(
        'vectors of other data are taken',
        'text/item_init.py',
        "record.get('data_sha256') != data_sha256",
        'False',
        'text/item_init_test.py',
    ),
    Mutant(
        'words are not weighted by rarity',
        'text/tfidf.py',
        'values = (1 + np.log(times)) * idf[buckets]',
        'values = 1 + np.log(times)',
        'text/tfidf_test.py',
    ),
    Mutant(
        'a label at the limit is too common',
        'text/facets.py',
        'if count > most}',
        'if count >= most}',
        'text/facets_test.py',
    ),
    Mutant(
        'surplus facets are dropped',
        'text/facets.py',
        "return ['+'.join(merged), *rest]",
        'return [merged[0], *rest]',
        'text/facets_test.py',
    ),
    Mutant(
        'shuffled labels are not shuffled',
        'text/facets.py',
        'np.concatenate([label_VS[:1], label_VS[order]])',
        'label_VS',
        'text/facets_test.py',
    ),
    Mutant(
        'dropout of texts is not scaled',
        'text/facet_objective.py',
        'text_BE / (1 - rate)',
        'text_BE',
        'text/facet_objective_test.py',
    ),
    Mutant(
        'an update moves the other heads',
        'text/facet_objective.py',
        "own = {f'head_{h}': params[f'head_{h}'] for h in heads}",
        'own = dict(params)',
        'text/facet_objective_test.py',
    ),
    Mutant(
        'text vectors are not centred',
        'text/vectors.py',
        'centred_VE = (text_VE - mean_1E) * has_text_V1',
        'centred_VE = text_VE * has_text_V1',
        'text/vectors_test.py',
    ),
    Mutant(
        'items without a text have a vector',
        'text/projection.py',
        'np.where(has_text_V1, item_VD, 0)',
        'np.asarray(item_VD)',
        'text/facet_objective_test.py',
    ),
    # Trackers.
    Mutant(
        'a resumed run is another tracked run',
        'training/trackers.py',
        "begun = str(stored.get(name) or '')",
        "begun = ''",
        'training/trackers_test.py -k settings_once',
    ),
    Mutant(
        'the failure of a tracker ends the run',
        'training/trackers.py',
        'except Exception as error:  # of any library',
        'except UserError as error:  # of any library',
        'training/trackers_test.py -k one_line_and',
    ),
    # Reports.
    Mutant(
        'the page shows validation ranks',
        'report/collect.py',
        "protocol: file[f'{stage}/test/{protocol}']",
        "protocol: file[f'{stage}/validation/{protocol}']",
        BEST,
    ),
    Mutant(
        'groups of the page by all actions',
        'report/collect.py',
        'trained, _ = data.training_histories()',
        'trained = data.items',
        COUNTS,
    ),
    Mutant(
        'the curve of the test split',
        'report/collect.py',
        "== (selected, 'validation')",
        "== (selected, 'test')",
        f'report/collect_test.py {BEST} -k "page or curve"',
    ),
    Mutant(
        'deviation of a table with ddof 0',
        'report/tables.py',
        'np.std(values, ddof=1)',
        'np.std(values)',
        'report/tables_test.py',
    ),
    Mutant(
        'a seed counts twice',
        'report/tables.py',
        'same = next((one for one in group if one.seed == result.seed), None)',
        'same = None',
        'report/tables_test.py',
    ),
    Mutant(
        'tables of validation ranks',
        'report/tables.py',
        "ranks[f'{self.stage}/test/{protocol}']",
        "ranks[f'{self.stage}/validation/{protocol}']",
        'report/tables_test.py',
    ),
    Mutant(
        'the best of compared runs by test',
        'report/comparison_record.py',
        "run.spread('validation', self.protocol, SELECTION)",
        "run.spread('test', self.protocol, SELECTION)",
        'report/comparison_test.py -k best_run',
    ),
    Mutant(
        'runs of other splits are compared',
        'report/compared_runs.py',
        'return Key(data_of(report.card), *facts, select_on=report.protocol)',
        "return Key(data_of(report.card), *[''] * 5, select_on=report.protocol)",
        'report/comparison_test.py -k own',
    ),
    Mutant(
        'the ranks of a split by time are of all users',
        'report/collect.py',
        "return by_time['test']['targets'] if by_time else card['dataset']['users']",
        "return card['dataset']['users']",
        'report/comparison_test.py -k splits',
    ),
    Mutant(
        'groups of a split by time are of the last items',
        'report/comparison.py',
        'if by_time:\n        data =',
        'if False:\n        data =',
        'report/comparison_test.py -k groups',
    ),
    Mutant(
        'models with other settings in one row of splits',
        'report/comparison.py',
        'if k not in OF_SPLIT))',
        'if k in OF_SPLIT))',
        'report/comparison_test.py -k split',
    ),
    Mutant(
        'the last of several runs stands in the table of splits',
        'report/comparison.py',
        'if before is None or len(run.reports) > len(before.reports):',
        'if True:',
        'report/comparison_test.py -k silence',
    ),
    Mutant(
        'an update of an update doubles the rows of a step again',
        'stages/updated_run.py',
        '.default) * (1 if is_update else ROWS)',
        '.default) * ROWS',
        'stages/update_test.py -k update_of_an_update',
    ),
    Mutant(
        'a grown model draws what has a new shape, whatever its name',
        'stages/initialize.py',
        'if before.get(path) != leaf.shape]',
        'if leaf.shape not in before.values()]',
        'stages/compilation_test.py -k grown',
    ),
    Mutant(
        'batches of one length have one width, however much padding that is',
        'data/eval_batches.py',
        'if len(seen) * sizes[0] * max(seen) <= SEEN_PLACES',
        'if True',
        'data/eval_batches_test.py -k one_width',
    ),
    Mutant(
        'each seed compiles the lists anew',
        'stages/open_recommender.py',
        'functions = _functions(module)',
        'functions = _functions.__wrapped__(module)',
        'stages/compilation_test.py -k equal_modules',
    ),
    Mutant(
        'an update splits a run of leave one out at a moment',
        'stages/updated_run.py',
        "if split != 'time' and 'split_at' in given.values:",
        'if False:',
        'stages/update_test.py -k one_flag',
    ),
    Mutant(
        'the interval of the first seed alone',
        'report/comparison.py',
        'significance.paired_interval(first_SU.mean(0), second_SU.mean(0))',
        'significance.paired_interval(first_SU[0], second_SU[0])',
        'report/comparison_test.py -k paired',
    ),
    Mutant(
        'the line of a sweep joins all settings',
        'report/figures_of_runs.py',
        'if others == others_S[best]',
        'if others',
        'report/figures_of_runs_test.py -k joins',
    ),
    Mutant(
        'the item that helps is said to hurt',
        'report/terminal.py',
        'change, past = min(',
        'change, past = max(',
        'report/terminal_test.py',
    ),
    # Devices, files, screen.
    Mutant(
        'a table has no room for the padding',
        'parallel/mesh.py',
        'return -(-(num_items + 1) // num_shards) * num_shards',
        'return -(-num_items // num_shards) * num_shards',
        'parallel/mesh_test.py models/sasrec_test.py',
    ),
    Mutant(
        'a process takes all rows',
        'parallel/mesh.py',
        'return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))',
        'return slice(0, num_rows)',
        'parallel/mesh_test.py parallel/sharded_step_test.py parallel/eight_devices_test.py',
        'one process has all devices; two processes are started by the slow tests alone',
    ),
    Mutant(
        'a file is replaced before it is written',
        'run_dir.py',
        'os.fsync(file.fileno())',
        'pass',
        'run_dir_test.py -k full_disk',
    ),
    Mutant(
        'two processes write',
        'run_dir.py',
        'fcntl.LOCK_EX | fcntl.LOCK_NB',
        'fcntl.LOCK_SH | fcntl.LOCK_NB',
        'run_dir_test.py -k process',
    ),
    Mutant(
        'sixty seconds',
        'screen.py',
        'if round(seconds, 1) < 60:',
        'if seconds < 60:',
        'screen_test.py',
    ),
    Mutant(
        'the bar begins at zero',
        'screen.py',
        'initial=done,',
        'initial=0,',
        'screen_test.py',
    ),
    Mutant(
        'the lock of a removed file counts',
        'run_dir.py',
        'if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):',
        'if True:',
        'run_dir_test.py -k "removes or lock"',
    ),
    Mutant(
        'the lock removes a folder that was there',
        'run_dir.py',
        'for path in made:',
        'for path in (folder,):',
        'run_dir_test.py -k lock',
    ),
    Mutant(
        'the outermost wait is named',
        'screen.py',
        'wait = self._waits[-1]\n',
        'wait = self._waits[0]\n',
        'screen_test.py',
    ),
    Mutant(
        'a line does not put the next one off',
        'screen.py',
        'and self._quiet() >= QUIET:',
        'and True:',
        'screen_test.py',
    ),
    Mutant(
        'a wait never ends',
        'screen.py',
        'self._change(self._waits.remove, wait)',
        'pass',
        'screen_test.py',
    ),
]


def choose(names: list[str]) -> list[Mutant]:
    """The mutants of these names, folders or files; all of them without names."""
    known = {mutant.name for mutant in MUTANTS}
    chosen = []
    for mutant in MUTANTS:
        if not names or any(
            mutant.name == name or (name not in known and mutant.file.startswith(name))
            for name in names
        ):
            chosen.append(mutant)
    if not chosen:
        sys.exit(f'no mutant is called {names}; see the table in {Path(__file__).name}')
    return chosen


def pytest_arguments(tests: str) -> list[str]:
    """The arguments of pytest; paths are below tests/."""
    words = shlex.split(tests)
    first = words.index('-k') if '-k' in words else len(words)
    return [*(f'tests/{path}' for path in words[:first]), *words[first:]]


def import_libraries() -> None:
    """Imports what all tests use and no fault can be in; this takes seconds."""
    os.environ.update(CACHE)
    for name in ('pytest', 'hypothesis', 'jax', 'flax.linen', 'optax', 'grain', 'scipy.sparse'):
        importlib.import_module(name)
    importlib.import_module('orbax.checkpoint')


def run_tests(folder: Path, tests: str, devices: int = 1) -> int | None:
    """The exit code of pytest in a copy of the package; None where it runs for too long.

    The tests run in a fork of this process, in which JAX has been imported and not used.
    """
    child = os.fork()
    if not child:
        run_in_child(folder, tests, devices)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_in_child(folder: Path, tests: str, devices: int) -> None:
    """Runs pytest in a copy of the package, and ends this process with its exit code."""
    import hypothesis
    import pytest

    code = 3  # pytest's own, for an internal error
    try:
        # One example that fails is enough: looking for the smallest takes minutes.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile('mutants', phases=phases)
        hypothesis.settings.load_profile('mutants')
        flags = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={devices}'
        os.chdir(folder)
        sys.path[0] = str(folder)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        options = ['-x', '-q', '-p', 'no:cacheprovider', '--capture=sys']
        code = int(pytest.main([*options, *pytest_arguments(tests)]))
    finally:
        os._exit(code)


def apply(mutant: Mutant, source: str) -> str:
    """The source with the fault.

    Raises:
      SystemExit: when its text is not there exactly once.
    """
    if source.count(mutant.old) != 1:
        sys.exit(
            f'{mutant.name!r}: its text occurs {source.count(mutant.old)} times in '
            f'fame_jax/{mutant.file}; bring the table up to date'
        )
    return source.replace(mutant.old, mutant.new)


def run_mutant(mutant: Mutant, folder: Path) -> str:
    """KILLED, SURVIVED or HANGS."""
    path = folder / 'fame_jax' / mutant.file
    source = path.read_text()
    path.write_text(apply(mutant, source))
    try:
        code = run_tests(folder, mutant.tests, mutant.devices)
    finally:
        path.write_text(source)
    if code not in (None, 0, 1, 2):
        sys.exit(f'{mutant.name!r}: pytest ended with {code}; do its tests exist?')
    return {None: HANGS, 0: SURVIVED}.get(code, KILLED)


def copy(folder: Path) -> None:
    """Copies the repository, without what tools leave in it."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)


def main(names: list[str]) -> int:
    """Runs the mutants and prints those that survive; 1 if one does without an excuse."""
    chosen, found, broken = choose(names), {}, []
    import_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy(folder)
        for tests, devices in dict.fromkeys((mutant.tests, mutant.devices) for mutant in chosen):
            if run_tests(folder, tests, devices) != 0:
                broken.append(tests)
                print(f'these tests fail without a fault: {tests}', flush=True)
                continue
            for mutant in (mutant for mutant in chosen if mutant.tests == tests):
                began = time.monotonic()
                found[mutant] = run_mutant(mutant, folder)
                line = f'{found[mutant]}: {mutant.name} ({mutant.file})'
                print(f'{line}, {time.monotonic() - began:.0f} s', flush=True)
    survived = [mutant for mutant, result in found.items() if result == SURVIVED]
    killed, without = len(found) - len(survived), sum(not mutant.excuse for mutant in survived)
    print(
        f'\n{len(found)} mutants: {killed} killed, {len(survived)} survived, {without} of these '
        f'without an excuse; {len(chosen) - len(found)} not tried'
    )
    for mutant in survived:
        excuse = f': {mutant.excuse}' if mutant.excuse else ''
        print(f'survived: {mutant.name} ({mutant.file}){excuse}')
    for tests in broken:
        print(f'these tests fail without a fault: {tests}')
    return int(without > 0 or bool(broken))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
