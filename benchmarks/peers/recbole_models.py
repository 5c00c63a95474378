"""Times a training epoch of a sequential model of RecBole's (CE loss) on one of our sequence files.

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
from recbole.model.sequential_recommender import CORE, BERT4Rec, GRU4Rec, SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

# RecBole looks for settings of its own under a dataset's name; this one is not among them.
DATASET = 'sequences'

TRANSFORMER = {'inner_size': 256, 'n_layers': 2, 'n_heads': 2}
# Each with the settings RecBole ships for it, spelled out since the comparison rests on them.
MODELS = {
    'SASRec': (
        SASRec,
        {
            **TRANSFORMER,
            'hidden_size': 64,
            'hidden_dropout_prob': 0.5,
            'attn_dropout_prob': 0.5,
        },
    ),
    'GRU4Rec': (
        GRU4Rec,
        {'embedding_size': 64, 'hidden_size': 128, 'num_layers': 1, 'dropout_prob': 0.3},
    ),
    'BERT4Rec': (
        BERT4Rec,
        {
            **TRANSFORMER,
            'hidden_size': 64,
            'hidden_dropout_prob': 0.2,
            'attn_dropout_prob': 0.2,
            'mask_ratio': 0.2,
            'ft_ratio': 0.5,
            'transform': 'mask_itemseq',
        },
    ),
    'CORE': (
        CORE,
        {
            **TRANSFORMER,
            'embedding_size': 64,
            'hidden_dropout_prob': 0.5,
            'attn_dropout_prob': 0.5,
            'dnn_type': 'trm',
            'sess_dropout': 0.2,
            'item_dropout': 0.2,
            'temperature': 0.07,
        },
    ),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data_dir', type=pathlib.Path, required=True, help='holds DATASET.txt')
    parser.add_argument('--dataset', default='Toys_and_Games')
    parser.add_argument('--model', choices=MODELS, default='SASRec')
    parser.add_argument('--batches', type=int, default=40, help='timed, at most those of an epoch')
    parser.add_argument('--warmup', type=int, default=5, help='untimed batches before the clock')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--eval_batch', type=int, default=4096, help="RecBole's default")
    parser.add_argument('--max_len', type=int, default=50)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--seed', type=int, default=2020)
    parser.add_argument(
        '--as_it_comes', action='store_true', help='with the anomaly detection RecBole leaves on'
    )
    parser.add_argument('--evaluate', action='store_true', help='time the test ranking too')
    parser.add_argument('--json', type=pathlib.Path, help='where to write the figures')
    args = parser.parse_args()
    if args.warmup < 0 or min(args.threads, args.batches) < 1:
        parser.error('--threads and --batches must be at least 1, --warmup at least 0')
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
    """The model's and the sequential defaults of RecBole."""
    return {
        'data_path': str(folder),
        'checkpoint_dir': str(folder / 'saved'),
        'load_col': {'inter': ['user_id', 'item_id', 'timestamp']},
        'MAX_ITEM_LIST_LENGTH': args.max_len,
        **MODELS[args.model][1],
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


def recbole_config(model, settings):
    """RecBole's Config reads sys.argv for settings of its own; keep our flags out of its sight."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        return Config(model=model, dataset=DATASET, config_dict=settings)
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
    gathering (and masking) of its rows, as an epoch's time does.
    """

    def __init__(self, loader, limit):
        self.loader = loader
        self.limit = min(limit, len(loader))
        self.rows = self.scored = 0
        self.stamps = []

    def __iter__(self):
        if not self.limit:
            return
        self.stamps = [time.perf_counter()]
        for batch in self.loader:
            yield batch
            self.stamps.append(time.perf_counter())
            self.rows += len(batch)
            self.scored += scored(batch)
            if len(self.stamps) > self.limit:
                return

    def seconds(self):
        return np.diff(self.stamps)


def scored(batch):
    """The terms of a batch's loss: one a row, and for BERT4Rec its masked positions.

    RecBole's BERT4Rec fills MASK_INDEX up with 0 and gives index 0 no weight, so that a row's first
    item is masked at times but never scored, and a prefix of one item trains nothing.
    """
    if 'MASK_INDEX' in batch:
        return int((batch['MASK_INDEX'] > 0).sum())
    return len(batch)


def time_training(trainer, loader, args):
    """Batches of RecBole's own training loop after a warm-up, and an epoch at their median."""
    if args.warmup:
        trainer._train_epoch(TimedBatches(loader, args.warmup), 0)
    batches = TimedBatches(loader, args.batches)
    loss = trainer._train_epoch(batches, 0)
    seconds = batches.seconds()
    p10, p50, p90 = (float(value) for value in np.percentile(seconds, [10, 50, 90]))
    return {
        'epoch_seconds': p50 * len(loader),
        'batch_seconds_median': p50,
        'batch_seconds_p10': p10,
        'batch_seconds_p90': p90,
        'batch_seconds_mean': float(seconds.mean()),
        'batches_timed': len(seconds),
        'batches_per_epoch': len(loader),
        'loss_terms_per_epoch': round(batches.scored / batches.rows * loader.sample_size),
        'last_loss_mean': loss / len(seconds),
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
        'model': args.model,
        'settings': MODELS[args.model][1],
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
    config = recbole_config(args.model, recbole_settings(args, folder))
    init_seed(config['seed'], config['reproducibility'])
    train_data, _, test_data = data_preparation(config, create_dataset(config))
    figures['targets_per_epoch'] = check_targets(train_data.dataset, sequences, args.max_len)
    model = MODELS[args.model][0](config, train_data.dataset).to(config['device'])
    trainer = Trainer(config, model)
    figures['parameters'] = sum(parameter.numel() for parameter in model.parameters())
    figures['items'] = train_data.dataset.item_num - 1
    figures |= time_training(trainer, train_data, args)
    if args.evaluate:
        figures |= time_evaluation(trainer, train_data, test_data)
    return figures


def summarize(figures):
    line = (
        f'RecBole {figures["versions"]["recbole"]} {figures["model"]} CE, {figures["dataset"]}, '
        f'torch {figures["versions"]["torch"]}, {figures["threads"]} threads, '
        f'anomaly detection {"on" if figures["anomaly_detection"] else "off"}: '
        f'{figures["epoch_seconds"]:.1f} s an epoch at the median, '
        f'batch of {figures["batch"]} {figures["batch_seconds_median"] * 1e3:.0f} ms '
        f'(P10 {figures["batch_seconds_p10"] * 1e3:.0f}, '
        f'P90 {figures["batch_seconds_p90"] * 1e3:.0f}; '
        f'{figures["batches_timed"]} timed, {figures["batches_per_epoch"]} an epoch), '
        f'{figures["targets_per_epoch"]:,} targets checked, '
        f'about {figures["loss_terms_per_epoch"]:,} terms in the losses'
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
    torch.autograd.set_detect_anomaly(True) at import. So its users pay for it with any of them;
    --as_it_comes times what they get.
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
    if not args.as_it_comes:
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
