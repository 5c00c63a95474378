"""Times a training epoch of a sequential model of RecBole's (CE loss) on one of our sequence files.

The training loop is RecBole's own `Trainer._train_epoch`, unchanged; only the loader handed to it
is wrapped, to record the time of every batch. Needs its own environment: see README.md here.
"""

import argparse
import collections
import contextlib
import json
import logging
import pathlib
import sys
import tempfile
import time
import warnings

import numpy as np
import pandas as pd
import recbole
import record
import scipy
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import CORE, BERT4Rec, GRU4Rec, SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

# RecBole has settings of its own for the names of known data sets; it has none for this one.
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
    parser.add_argument('--max_len', type=int, default=50)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--seed', type=int, default=2020)
    parser.add_argument(
        '--anomaly_detection', action='store_true', help='leave it on, as RecBole does by accident'
    )
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
        'eval_batch_size': 4096,
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
    """RecBole's Config, which would read settings from sys.argv, without our flags there."""
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
    """The first `limit` batches of a loader, with the time before and after each.

    A batch's time runs from the end of the step before it to the end of its own, so that it
    includes the gathering (and masking) of its rows, as an epoch's time does.
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
    terms = round(batches.scored / batches.rows * loader.sample_size)
    figures = record.summarize(seconds, len(loader), loss / len(seconds))
    return figures | {'loss_terms_per_epoch': terms}


def measure(args, folder):
    settings = MODELS[args.model][1]
    figures = record.describe_run(args, args.model, settings, recbole, pd, scipy)
    sequences = read_sequences(args.data_dir / f'{args.dataset}.txt')
    write_inter(sequences, folder)
    config = recbole_config(args.model, recbole_settings(args, folder))
    init_seed(config['seed'], config['reproducibility'])
    train_data, _, _ = data_preparation(config, create_dataset(config))
    figures['targets_per_epoch'] = check_targets(train_data.dataset, sequences, args.max_len)
    model = MODELS[args.model][0](config, train_data.dataset).to(config['device'])
    trainer = Trainer(config, model)
    figures['parameters'] = sum(parameter.numel() for parameter in model.parameters())
    figures['items'] = train_data.dataset.item_num - 1
    return figures | time_training(trainer, train_data, args)


def turn_off_anomaly_detection():
    """Turns off a check of every gradient for NaN that RecBole turns on by accident.

    Importing any sequential model of RecBole 1.2.1 imports all of them, and its sine.py calls
    torch.autograd.set_detect_anomaly(True) at import, which slows all of them down;
    --anomaly_detection leaves it on.
    """
    torch.autograd.set_detect_anomaly(False)


def hush_recbole():
    """Silences warnings that are known and harmless here.

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
    if not args.anomaly_detection:
        turn_off_anomaly_detection()
    # RecBole writes checkpoints and TensorBoard logs under the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        figures = measure(args, pathlib.Path(folder))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + '\n')
    print(json.dumps(figures, indent=2))


if __name__ == '__main__':
    main()
