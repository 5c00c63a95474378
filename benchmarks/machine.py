"""The machine that a figure was taken on."""

import os
import platform
from typing import Any

import jax

from fame_jax import run as run_lib
from fame_jax.results import peak_memory


def about() -> dict[str, Any]:
    """Device, processor, cores, memory in bytes, load, versions and date."""
    return run_lib.machine() | {
        'processor': processor(),
        'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'device_memory_bytes': device_memory().get('bytes_limit'),
        'load': os.getloadavg()[0],
    }


def processor() -> str:
    """The processor's name."""
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as lines:
            names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def device_memory() -> dict[str, int]:
    """What the first device tells of its memory; nothing on a CPU."""
    return jax.devices()[0].memory_stats() or {}


def peaks() -> dict[str, int]:
    """The most bytes that the process has held so far, and its device where it tells."""
    found = {'process': peak_memory()}
    device = device_memory().get('peak_bytes_in_use')
    return found | ({'device': device} if device is not None else {})
