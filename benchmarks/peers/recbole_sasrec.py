"""Times a training epoch of RecBole's SASRec (CE loss) on one of our sequence files.

The training loop is RecBole's own `Trainer._train_epoch`, unchanged; only the loader handed to it
is wrapped, to stamp the time of every batch. Needs its own environment: see README.md here.
"""

import argparse
import collections
import contextlib
import datetime
import json
import logging
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import warnings

import numpy as np
import pandas as pd
import recbole
import scipy
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender.sasrec import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

# RecBole looks for settings of its own under a dataset's name; this one is not among them.
DATASET = 'sequences'


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data_dir', type=pathlib.Path, required=True, help='holds DATASET.txt')
    parser.add_argument('--dataset', default='Toys_and_Games')
    length = parser.add_mutually_exclusive_group()
    length.add_argument('--steps', type=int, help='time this many batches and extrapolate')
    length.add_argument('--epochs', type=int, default=1, help='whole epochs to time')
    parser.add_argument('--warmup', type=int, default=5, help='untimed batches before the clock')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--eval_batch', type=int, default=4096, help="RecBole's default")
    parser.add_argument('--max_len', type=int, default=50)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--seed', type=int, default=2020)
    parser.add_argument(
        '--no_anomaly', action='store_true', help='turn off the anomaly detection RecBole leaves on'
    )
    parser.add_argument('--evaluate', action='store_true', help='time the test ranking too')
    parser.add_argument('--json', type=pathlib.Path, help='where to write the figures')
    args = parser.parse_args()
    steps = 1 if args.steps is None else args.steps
    if args.warmup < 0 or min(args.threads, args.epochs, steps) < 1:
        parser.error('--threads, --epochs and --steps must be at least 1, --warmup at least 0')
    return args


def read_sequences(path):
    """One user a line, `user item item ...`, oldest first. Returns {user: [item, ...]}."""
    sequences = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        user, *items = line.split()
        if user in sequences:
            raise SystemExit(f'{path}:{number}: user {user} has more than one line')
        sequences[user] = items
    return sequences


def write_inter(sequences, folder):
    """RecBole's atomic file; the timestamp is the position, so that sorting keeps the order."""
    target = folder / DATASET / f'{DATASET}.inter'
    target.parent.mkdir(parents=True)
    with target.open('w') as file:
        file.write('user_id:token\titem_id:token\ttimestamp:float\n')
        for user, items in sequences.items():
            file.writelines(f'{user}\t{item}\t{at}\n' for at, item in enumerate(items))


def recbole_settings(args, folder):
    """SASRec's and the sequential defaults of RecBole, spelled out where the comparison rests."""
    return {
        'data_path': str(folder),
        'checkpoint_dir': str(folder / 'saved'),
        'load_col': {'inter': ['user_id', 'item_id', 'timestamp']},
        'MAX_ITEM_LIST_LENGTH': args.max_len,
        'hidden_size': 64,
        'inner_size': 256,
        'n_layers': 2,
        'n_heads': 2,
        'hidden_dropout_prob': 0.5,
        'attn_dropout_prob': 0.5,
        'loss_type': 'CE',
        'train_neg_sample_args': None,
        'learner': 'adam',
        'learning_rate': 1e-3,
        'train_batch_size': args.batch,
        'eval_batch_size': args.eval_batch,
        'eval_args': {
            'split': {'LS': 'valid_and_test'},
            'order': 'TO',
            'group_by': 'user',
            'mode': 'full',
        },
        'metrics': ['Hit', 'NDCG', 'MRR'],
        'topk': [10],
        'valid_metric': 'NDCG@10',
        'use_gpu': False,
        'gpu_id': '',
        'seed': args.seed,
        'show_progress': False,
    }


def recbole_config(settings):
    """RecBole's Config reads sys.argv for settings of its own; keep our flags out of its sight."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        return Config(model='SASRec', dataset=DATASET, config_dict=settings)
    finally:
        sys.argv = argv


def expected_targets(sequences, max_len):
    """Counts the (user, prefix, target) triples of training: all but each user's last two items."""
    return collections.Counter(
        (user, tuple(items[max(0, at - max_len) : at]), items[at])
        for user, items in sequences.items()
        for at in range(1, len(items) - 2)
    )


def recbole_targets(dataset):
    """Counts the same triples in RecBole's training set, in the tokens of our file."""
    rows = dataset.inter_feat
    users = dataset.id2token('user_id', rows['user_id'].numpy())
    targets = dataset.id2token('item_id', rows['item_id'].numpy())
    prefixes = dataset.id2token('item_id', rows['item_id_list'].numpy())
    lengths = rows['item_length'].numpy()
    return collections.Counter(
        (user, tuple(prefix[:length]), target)
        for user, prefix, length, target in zip(users, prefixes, lengths, targets)
    )


def check_targets(dataset, sequences, max_len):
    """Refuses to time an epoch whose targets are not ours. Returns their number."""
    ours, theirs = expected_targets(sequences, max_len), recbole_targets(dataset)
    if ours != theirs:
        raise SystemExit(
            f'RecBole trains on {theirs.total()} targets, the file holds {ours.total()}; '
            f'{(ours - theirs).total()} missing, {(theirs - ours).total()} extra'
        )
    return theirs.total()


class TimedBatches:
    """Hands on a loader's batches, the first `limit` of them, and stamps the time around each.

    A batch's time runs from the end of the step before it to the end of its own, so it holds the
    gathering of its rows, as an epoch's time does.
    """

    def __init__(self, loader, limit=None):
        self.loader = loader
        self.limit = len(loader) if limit is None else min(limit, len(loader))
        self.rows = 0
        self.stamps = []

    def __iter__(self):
        if not self.limit:
            return
        self.stamps = [time.perf_counter()]
        for batch in self.loader:
            yield batch
            self.stamps.append(time.perf_counter())
            self.rows += len(batch)
            if len(self.stamps) > self.limit:
                return

    def seconds(self):
        return np.diff(self.stamps)


def time_pass(trainer, loader, epoch, limit=None):
    """One pass of RecBole's own training loop. Returns its seconds, the batches', rows and loss."""
    batches = TimedBatches(loader, limit)
    start = time.perf_counter()
    loss = trainer._train_epoch(batches, epoch)
    return time.perf_counter() - start, batches.seconds(), batches.rows, loss


def time_training(trainer, loader, targets, args):
    if args.warmup:
        time_pass(trainer, loader, 0, args.warmup)
    if args.steps:
        _, batch_seconds, rows, loss = time_pass(trainer, loader, 0, args.steps)
        epochs = [float(batch_seconds.mean()) * len(loader)]
    else:
        epochs, parts = [], []
        for epoch in range(args.epochs):
            seconds, part, rows, loss = time_pass(trainer, loader, epoch)
            if rows != targets:
                raise SystemExit(f'the epoch held {rows} targets, not {targets}')
            epochs.append(seconds)
            parts.append(part)
        batch_seconds = np.concatenate(parts)
    p10, p50, p90 = np.percentile(batch_seconds, [10, 50, 90])
    return {
        'epoch_seconds': statistics.median(epochs),
        'epoch_seconds_each': epochs,
        'extrapolated': bool(args.steps),
        'batch_seconds_median': float(p50),
        'batch_seconds_p10': float(p10),
        'batch_seconds_p90': float(p90),
        'batches_timed': len(batch_seconds),
        'batches_per_epoch': len(loader),
        'targets_per_epoch': targets,
        'last_loss_mean': loss / (min(args.steps, len(loader)) if args.steps else len(loader)),
    }


def time_evaluation(trainer, train_data, test_data):
    """The full ranking of every test user, scoring and metrics, as RecBole's fit would run it."""
    trainer.eval_collector.data_collect(train_data)
    start = time.perf_counter()
    metrics = trainer.evaluate(test_data, load_best_model=False)
    return {
        'evaluation_seconds': time.perf_counter() - start,
        'evaluation_users': len(test_data.dataset),
        'evaluation_metrics': {name: float(value) for name, value in metrics.items()},
    }


def describe_run(args):
    return {
        'dataset': args.dataset,
        'batch': args.batch,
        'max_len': args.max_len,
        'warmup_batches': args.warmup,
        'anomaly_detection': torch.is_anomaly_enabled(),
        'threads': torch.get_num_threads(),
        'cpus': os.cpu_count(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'load_average_before': round(os.getloadavg()[0], 2),
        'versions': {
            'python': platform.python_version(),
            'recbole': recbole.__version__,
            'torch': torch.__version__,
            'numpy': np.__version__,
            'pandas': pd.__version__,
            'scipy': scipy.__version__,
        },
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }


def measure(args, folder):
    figures = describe_run(args)
    sequences = read_sequences(args.data_dir / f'{args.dataset}.txt')
    write_inter(sequences, folder)
    config = recbole_config(recbole_settings(args, folder))
    init_seed(config['seed'], config['reproducibility'])
    train_data, _, test_data = data_preparation(config, create_dataset(config))
    targets = check_targets(train_data.dataset, sequences, args.max_len)
    model = SASRec(config, train_data.dataset).to(config['device'])
    trainer = Trainer(config, model)
    figures['parameters'] = sum(parameter.numel() for parameter in model.parameters())
    figures['items'] = train_data.dataset.item_num - 1
    figures |= time_training(trainer, train_data, targets, args)
    if args.evaluate:
        figures |= time_evaluation(trainer, train_data, test_data)
    return figures


def summarize(figures):
    line = (
        f'RecBole {figures["versions"]["recbole"]} SASRec CE, {figures["dataset"]}, '
        f'torch {figures["versions"]["torch"]}, {figures["threads"]} threads, '
        f'anomaly detection {"on" if figures["anomaly_detection"] else "off"}: '
        f'{figures["epoch_seconds"]:.1f} s an epoch'
        f'{" (extrapolated)" if figures["extrapolated"] else ""}, '
        f'batch of {figures["batch"]} {figures["batch_seconds_median"] * 1e3:.0f} ms '
        f'(P10 {figures["batch_seconds_p10"] * 1e3:.0f}, '
        f'P90 {figures["batch_seconds_p90"] * 1e3:.0f}; '
        f'{figures["batches_timed"]} timed, {figures["batches_per_epoch"]} an epoch), '
        f'{figures["targets_per_epoch"]:,} targets checked'
    )
    if 'evaluation_seconds' in figures:
        line += (
            f'; full ranking of {figures["evaluation_users"]:,} test users '
            f'{figures["evaluation_seconds"]:.1f} s'
        )
    return f'{line}; {figures["date"]}'


def turn_off_anomaly_detection():
    """Ends a check that RecBole turns on unasked: every gradient searched for NaN.

    Importing any sequential model of RecBole 1.2.1 imports all of them, and its sine.py calls
    torch.autograd.set_detect_anomaly(True) at import. So a user of SASRec pays for it too, and by
    default this script times what that user gets.
    """
    torch.autograd.set_detect_anomaly(False)


def hush_recbole():
    """Silences what is known and harmless here, so that one line is printed.

    RecBole builds a torch.cuda.amp.GradScaler (disabled, deprecated) on every pass, fills missing
    values in a way pandas 3 ends (our file has none), and warns of our flags in sys.argv.
    """
    warnings.filterwarnings('ignore', category=FutureWarning, module=r'recbole\.')
    logging.getLogger().setLevel(logging.ERROR)


def main():
    args = parse_arguments()
    args.data_dir = args.data_dir.resolve()
    out = args.json and args.json.resolve()
    torch.set_num_threads(args.threads)
    hush_recbole()
    if args.no_anomaly:
        turn_off_anomaly_detection()
    # RecBole writes checkpoints and TensorBoard logs under the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        figures = measure(args, pathlib.Path(folder))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + '\n')
    print(summarize(figures))


if __name__ == '__main__':
    main()
