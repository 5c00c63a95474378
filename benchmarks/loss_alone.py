"""The full-catalogue cross-entropy alone: value and both gradients, one variant against another.

    python -m benchmarks.loss_alone --json loss_alone.json

All variants are compiled first and then take turns, one call each a round, so that a noisy
neighbour troubles all alike. GFLOP/s counts the three products that no exact gradient can do
without, 6 T V D, whatever a variant really does; `products` is those three and nothing else, and
`one product` the first of them.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from fame_jax import losses

matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def make_data(tokens, items, width, dtype):
    """Queries and a table like those of a cosine similarity with temperature .07; 5 % padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    query_TD = jax.random.normal(keys[0], (tokens, width))
    item_VD = jax.random.normal(keys[1], (items + 1, width))
    query_TD /= 0.07 * jnp.linalg.norm(query_TD, axis=1, keepdims=True)
    item_VD /= jnp.linalg.norm(item_VD, axis=1, keepdims=True)
    target_T = jax.random.randint(keys[2], (tokens,), 1, items + 1)
    weight_T = (jax.random.uniform(keys[3], (tokens,)) > 0.05).astype(jnp.float32)
    return query_TD.astype(dtype), item_VD.astype(dtype), target_T, weight_T


def masked_logits(query_TD, item_VD):
    logit_TV = matmul(query_TD, item_VD.T)
    column_TV = lax.broadcasted_iota(jnp.int32, logit_TV.shape, 1)
    return jnp.where(column_TV == 0, -jnp.inf, logit_TV), column_TV


def mask_gather_logit(query_TD, item_VD, target_T, weight_T):
    logit_TV, _ = masked_logits(query_TD, item_VD)
    picked_T = jnp.take_along_axis(logit_TV, target_T[:, None], axis=1)[:, 0]
    return ((jax.nn.logsumexp(logit_TV, axis=1) - picked_T) * weight_T).sum()


def mask_compare(query_TD, item_VD, target_T, weight_T):
    logit_TV, column_TV = masked_logits(query_TD, item_VD)
    hit_TV = column_TV == target_T[:, None]
    picked_T = jnp.where(hit_TV, jax.nn.log_softmax(logit_TV), 0).sum(axis=1)
    return -(picked_T * weight_T).sum()


def mask_gather_item(query_TD, item_VD, target_T, weight_T):
    logit_TV, _ = masked_logits(query_TD, item_VD)
    picked_T = jnp.einsum('TD,TD->T', query_TD, item_VD[target_T])
    return ((jax.nn.logsumexp(logit_TV, axis=1) - picked_T) * weight_T).sum()


def slice_gather_item(query_TD, item_VD, target_T, weight_T):
    logit_TV = matmul(query_TD, item_VD[1:].T)
    picked_T = jnp.einsum('TD,TD->T', query_TD, item_VD[target_T])
    return ((jax.nn.logsumexp(logit_TV, axis=1) - picked_T) * weight_T).sum()


def slice_items_first(query_TD, item_VD, target_T, weight_T):
    logit_VT = matmul(item_VD[1:], query_TD.T)
    picked_T = jnp.einsum('TD,TD->T', query_TD, item_VD[target_T])
    return ((jax.nn.logsumexp(logit_VT, axis=0) - picked_T) * weight_T).sum()


def by_hand(query_TD, item_VD, target_T, weight_T, items_first):
    """Value and gradients from one unnormalised softmax, without the barrier of `losses`."""
    rest_VD, picked_TD = item_VD[1:], item_VD[target_T]
    if items_first:
        logit_VT = matmul(rest_VD, query_TD.T)
        max_T = logit_VT.max(axis=0)
        exp_VT = jnp.exp(logit_VT - max_T[None, :])
        total_T, exp_TV = exp_VT.sum(axis=0), exp_VT.T
    else:
        logit_TV = matmul(query_TD, rest_VD.T)
        max_T = logit_TV.max(axis=1)
        exp_TV = jnp.exp(logit_TV - max_T[:, None])
        total_T = exp_TV.sum(axis=1)
    loss_T = max_T + jnp.log(total_T) - jnp.einsum('TD,TD->T', query_TD, picked_TD)
    d_query_TD = weight_T[:, None] * (matmul(exp_TV, rest_VD) / total_T[:, None] - picked_TD)
    d_item_VD = matmul(exp_TV.T, query_TD * (weight_T / total_T)[:, None])
    d_item_VD = jnp.pad(d_item_VD, ((1, 0), (0, 0)))
    d_item_VD = d_item_VD.at[target_T].add(-query_TD * weight_T[:, None])
    return (loss_T * weight_T).sum(), (d_query_TD, d_item_VD)


def products(query_TD, item_VD, target_T, weight_T):
    rest_VD = item_VD[1:]
    logit_TV = lax.optimization_barrier(matmul(query_TD, rest_VD.T)).astype(query_TD.dtype)
    return matmul(logit_TV, rest_VD), matmul(query_TD.T, logit_TV)


def one_product(query_TD, item_VD, target_T, weight_T):
    return matmul(query_TD, item_VD.T)


def make_variants(chunks):
    def graded(loss):
        return jax.value_and_grad(loss, argnums=(0, 1))

    def chunked(chunk_tokens, chunk_items):
        sizes = {'chunk_tokens': chunk_tokens, 'chunk_items': chunk_items}
        return graded(lambda *args: losses.chunked_cross_entropy(*args, **sizes)[0])

    variants = {
        'one product': one_product,
        'products': products,
        'autodiff, column masked, logits gathered': graded(mask_gather_logit),
        'autodiff, column masked, target by compare': graded(mask_compare),
        'autodiff, column masked, items gathered': graded(mask_gather_item),
        'autodiff, row sliced off, items gathered': graded(slice_gather_item),
        'autodiff, row sliced off, logits [V, T]': graded(slice_items_first),
        'gradient with the value, no barrier': functools.partial(by_hand, items_first=False),
        'gradient with the value, logits [V, T]': functools.partial(by_hand, items_first=True),
        'cross_entropy': graded(lambda *args: losses.cross_entropy(*args)[0]),
        'cross_entropy, value alone': lambda *args: losses.cross_entropy(*args)[0],
    }
    return variants | {f'chunked {t} x {v or "all"}': chunked(t, v) for t, v in chunks}


def measure(variants, data, rounds):
    compiled = {name: jax.jit(f).lower(*data).compile() for name, f in variants.items()}
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, f in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*data))
            if turn:  # The first round warms up.
                seconds[name].append(time.perf_counter() - start)
    memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
    return seconds, memory


def processor():
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as lines:
            names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tokens', type=int, default=512)
    parser.add_argument('--items', type=int, default=11925)
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument('--rounds', type=int, default=40)
    parser.add_argument(
        '--chunks',
        default='64x0,128x0,256x0,0x2048,128x1024,256x512,256x1024,256x4096',
        help='TOKENSxITEMS, comma-separated; 0 is all of them.',
    )
    parser.add_argument('--json', help='Write the result to this file too.')
    args = parser.parse_args()

    chunks = [tuple(map(int, chunk.split('x'))) for chunk in args.chunks.split(',')]
    data = make_data(args.tokens, args.items, args.width, args.dtype)
    seconds, memory = measure(make_variants(chunks), data, args.rounds)

    product = 2 * args.tokens * args.items * args.width
    counts = {'one product': 1, 'cross_entropy, value alone': 1}
    kept = np.median(seconds['cross_entropy'])
    rows = []
    for name, times in seconds.items():
        p10, median, p90 = np.quantile(times, [0.1, 0.5, 0.9])
        rows.append(
            {
                'variant': name,
                'median_ms': 1e3 * median,
                'p10_ms': 1e3 * p10,
                'p90_ms': 1e3 * p90,
                'ratio': median / kept,
                'gflops': 1e-9 * counts.get(name, 3) * product / median,
                'temporaries_mib': memory[name] / 2**20,
            }
        )
    result = {
        'shape': {'tokens': args.tokens, 'items': args.items, 'width': args.width},
        'dtype': args.dtype,
        'rounds': args.rounds,
        'date': datetime.date.today().isoformat(),
        'machine': {
            'device': jax.devices()[0].device_kind,
            'processor': processor(),
            'cores': os.cpu_count(),
            'load': os.getloadavg()[0],
        },
        'versions': {
            'python': platform.python_version(),
            'jax': jax.__version__,
            'jaxlib': jaxlib.__version__,
            'numpy': np.__version__,
        },
        'rows': rows,
    }
    print(', '.join(f'{k} {v}' for k, v in (result['shape'] | result['machine']).items()))
    print(f'{"variant":44}  median    P10    P90 ms   ratio  GFLOP/s  temp MiB')
    for row in rows:
        print(
            f'{row["variant"]:44} {row["median_ms"]:7.2f} {row["p10_ms"]:6.2f} {row["p90_ms"]:6.2f}'
            f' {row["ratio"]:10.2f} {row["gflops"]:8.0f} {row["temporaries_mib"]:9.1f}'
        )
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(result, file, indent=2)


if __name__ == '__main__':
    main()
