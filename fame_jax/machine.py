"""The machine that a figure was measured on."""

import os
import platform
import re
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import fame_jax


def describe() -> dict[str, Any]:
    """Versions, device, cores and date, for metrics.jsonl and the protocol card.

    `matmul_precision` is that of JAX for products of float32 matrices: 'default' is the device's
    own, such as TF32 on a GPU; `JAX_DEFAULT_MATMUL_PRECISION` sets another.
    """
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    device = jax.devices()[0]
    return {
        'code': fame_jax.__version__,
        'versions': {'python': platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        'device': {
            'kind': device.device_kind,
            'platform': device.platform,
            'count': jax.device_count(),
        },
        'matmul_precision': jax.config.jax_default_matmul_precision or 'default',
        'system': platform.platform(),
        'cores': cores(),
        'date': time.strftime('%Y-%m-%d'),
    }


def cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory that this program has used so far, in bytes.

    On Linux not by `getrusage`, whose peak begins with that of the process that started this one.
    """
    status = Path('/proc/self/status')
    if status.exists() and (found := re.search(r'VmHWM:\s+(\d+) kB', status.read_text())):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory() -> int | None:
    """Bytes of the first device that programs may take; None where JAX does not know, as on CPU."""
    return (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
