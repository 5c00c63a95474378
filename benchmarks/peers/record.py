"""The record that both peers write: the circumstances of a run, and the seconds of its batches."""

import datetime
import os
import platform

import numpy as np


def describe_run(args, model, settings, *libraries):
    """Model, data, machine, versions and date, before the first batch."""
    import torch

    return {
        'model': model,
        'settings': settings,
        **{name: getattr(args, name) for name in ('dataset', 'batch', 'max_len', 'warmup')},
        'anomaly_detection': torch.is_anomaly_enabled(),
        'threads': torch.get_num_threads(),
        'cpus': os.cpu_count(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'load_average_before': round(os.getloadavg()[0], 2),
        'versions': {'python': platform.python_version()}
        | {library.__name__: library.__version__ for library in (torch, np, *libraries)},
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }


def summarize(seconds, batches_per_epoch, losses_mean):
    """The batches that were timed, and an epoch at their median."""
    p10, p50, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    return {
        'epoch_seconds': p50 * batches_per_epoch,
        'batch_seconds_median': p50,
        'batch_seconds_p10': p10,
        'batch_seconds_p90': p90,
        'batches_timed': len(seconds),
        'batches_per_epoch': batches_per_epoch,
        'last_loss_mean': losses_mean,
    }
