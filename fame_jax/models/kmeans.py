"""k-means on the device: k-means++ seeds, then Lloyd's iterations.

Letters: N points of D numbers each, C clusters.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

CHUNK = 2048  # points compared to the centroids at a time, so that they fit into a CPU's cache


class Clusters(NamedTuple):
    """The result of `fit`; float32 but for the assignment."""

    centroid_CD: Array
    assigned_N: Array  # int32, the nearest centroid of each point, padding included
    inertia_I: Array  # sum_n w_n |x_n - nearest|^2, for the seeds and after each iteration


def fit(
    key: Array, point_ND: Array, weight_N: Array, *, clusters: int, iterations: int = 20
) -> Clusters:
    """Clusters points: each centroid is the mean of the points nearest to it.

    k-means++ (Arthur & Vassilvitskii 2007), then a fixed number of Lloyd's iterations. A cluster
    without points keeps its centroid, so that the inertia never rises. The same key and points give
    the same clusters.

    Args:
      key: consumed.
      point_ND: any float dtype; computed in float32.
      weight_N: >= 0, the weight of each point; 0 for padding.
      clusters: C.
      iterations: Lloyd's iterations.

    Raises:
      ValueError: if there are fewer points with a weight than clusters.
    """
    count = int(np.count_nonzero(np.asarray(weight_N) > 0))
    if not 0 < clusters <= count:
        raise ValueError(f'{clusters} clusters of {count} points')
    point_ND, weight_N = jnp.asarray(point_ND, jnp.float32), jnp.asarray(weight_N, jnp.float32)
    return _fit(key, point_ND, weight_N, clusters, iterations)


@partial(jax.jit, static_argnums=(3, 4))
def _fit(key: Array, point_ND: Array, weight_N: Array, clusters: int, iterations: int) -> Clusters:
    def iterate(centroid_CD: Array, _: None) -> tuple[Array, Array]:
        assigned_N = nearest(point_ND, centroid_CD)
        inertia = _inertia(point_ND, weight_N, centroid_CD, assigned_N)
        return _means(point_ND, weight_N, centroid_CD, assigned_N), inertia

    seed_CD = point_ND[seed(key, point_ND, weight_N, clusters)]
    centroid_CD, inertia_I = jax.lax.scan(iterate, seed_CD, length=iterations)
    assigned_N = nearest(point_ND, centroid_CD)
    last = _inertia(point_ND, weight_N, centroid_CD, assigned_N)
    return Clusters(centroid_CD, assigned_N, jnp.append(inertia_I, last))


def seed(key: Array, point_ND: Array, weight_N: Array, clusters: int) -> Array:
    """k-means++ seeds: indices of points, drawn one after another; int32 [C].

        P(n) = w_n d_n^2 / sum_m w_m d_m^2,    d_n = min over the points drawn so far |x_n - x|

    The first is drawn by the weights alone; so is the next if all distances are 0. A point of
    weight 0 is never drawn.
    """

    def draw(near_N: Array, key: Array) -> tuple[Array, Array]:
        mass_N = weight_N * near_N
        mass_N = jnp.where(jnp.any(mass_N > 0), mass_N, weight_N)
        index = jax.random.categorical(key, jnp.log(mass_N))
        return jnp.minimum(near_N, squared_distance(index)), index

    def squared_distance(index: Array) -> Array:
        # A sum of squared differences, and not a product: the distance of a copy is exactly 0.
        return jnp.square(point_ND - point_ND[index][None]).sum(axis=1)

    keys = jax.random.split(key, clusters)
    first = jax.random.categorical(keys[0], jnp.log(weight_N))
    _, index_C = jax.lax.scan(draw, squared_distance(first), keys[1:])
    return jnp.append(first, index_C)


def nearest(point_ND: Array, centroid_CD: Array) -> Array:
    """The nearest centroid of each point; ties take the first; int32 [N]."""
    half_C = jnp.square(centroid_CD).sum(axis=1) / 2
    index_C = jnp.arange(len(centroid_CD), dtype=jnp.int32)

    def choose(x_D: Array) -> Array:
        # |x - c|^2 / 2 without |x|^2 / 2, which is the same for all centroids.
        distance_C = half_C - jnp.matmul(centroid_CD, x_D, precision='highest')
        # On a CPU, XLA's argmin takes twice as long.
        return jnp.where(distance_C <= distance_C.min(), index_C, len(half_C)).min()

    return jax.lax.map(choose, point_ND, batch_size=min(CHUNK, len(point_ND)))


def _means(point_ND: Array, weight_N: Array, centroid_CD: Array, assigned_N: Array) -> Array:
    clusters = len(centroid_CD)
    # On a CPU, a product with the one-hot assignment takes 27 times as long.
    sum_CD = jax.ops.segment_sum(point_ND * weight_N[:, None], assigned_N, clusters)
    count_C1 = jax.ops.segment_sum(weight_N, assigned_N, clusters)[:, None]
    return jnp.where(count_C1 > 0, sum_CD / jnp.where(count_C1 > 0, count_C1, 1), centroid_CD)


def _inertia(point_ND: Array, weight_N: Array, centroid_CD: Array, assigned_N: Array) -> Array:
    return (weight_N * jnp.square(point_ND - centroid_CD[assigned_N]).sum(axis=1)).sum()
