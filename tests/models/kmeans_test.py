"""k-means against explicit loops; its seeds, its inertia, and what is degenerate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_close, new_key, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.models import kmeans


def fit(points, weights=None, *, clusters, seed=0, iterations=8):
    points = np.asarray(points)
    weights = np.ones(len(points), np.float32) if weights is None else np.asarray(weights)
    actual = kmeans.fit(new_key(seed), points, weights, clusters=clusters, iterations=iterations)
    return jax.device_get(actual)


def cloud(points=40, width=3, seed=0):
    return np.random.default_rng(seed).normal(size=(points, width)).astype(np.float32)


def lloyd_loop(points, weights, centroids, iterations):
    """Centroids, assignment and inertia of every round, a point at a time in float64."""
    centroids = [np.array(c, np.float64) for c in centroids]
    inertia = []
    for i in range(iterations + 1):
        assigned = []
        total = 0.0
        for x, w in zip(points, weights):
            distances = [sum((x - c) ** 2) for c in centroids]
            assigned.append(int(np.argmin(distances)))
            total += w * min(distances)
        inertia.append(total)
        if i == iterations:
            return centroids, assigned, inertia
        for c in range(len(centroids)):
            own = [n for n in range(len(points)) if assigned[n] == c and weights[n] > 0]
            if own:
                mass = sum(weights[n] for n in own)
                centroids[c] = sum(weights[n] * points[n] for n in own) / mass


def test_is_lloyds_algorithm_from_its_seeds():
    points = cloud()
    weights = np.random.default_rng(1).uniform(0.5, 2, 40).astype(np.float32)
    weights[[3, 17]] = 0
    actual = fit(points, weights, clusters=5, iterations=4)
    seeds = points[quick_jit(partial(kmeans.seed, clusters=5))(new_key(0), points, weights)]
    centroids, assigned, inertia = lloyd_loop(points.astype(float), weights, seeds, 4)
    assert_close(actual.centroid_CD, centroids)
    assert_close(actual.inertia_I, inertia)
    assert actual.assigned_N.tolist() == assigned
    assert actual.inertia_I[-1] < 0.9 * actual.inertia_I[0]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_inertia_never_rises(seed, grid):
    points = cloud(seed=seed)
    points = np.round(points) if grid else points  # of many copies and ties
    inertia_I = fit(points, clusters=7, seed=seed).inertia_I
    assert (np.diff(inertia_I) <= 1e-5 * inertia_I[0]).all()


def test_seeds_are_drawn_by_the_squared_distance_to_the_nearest_so_far():
    points = cloud(12, 2)
    weights = np.array([1, 2, 0, 1, 1, 3, 1, 0, 1, 1, 0.5, 1], np.float32)
    index_C = quick_jit(partial(kmeans.seed, clusters=5))(new_key(4), points, weights)
    keys = jax.random.split(new_key(4), 5)
    drawn = []
    for c in range(5):
        mass = []
        for x, w in zip(points.astype(float), weights):
            near = min((sum((x - points[i]) ** 2) for i in drawn), default=1.0)
            mass.append(w * near)
        assert all(mass[i] == 0 for i in drawn)
        with np.errstate(divide='ignore'):
            drawn.append(int(jax.random.categorical(keys[c], np.log(np.float32(mass)))))
    assert index_C.tolist() == drawn


def test_a_second_seed_is_as_likely_as_its_distance_is_squared():
    points = jnp.array([[0.0], [1], [3]])
    draw = jax.vmap(lambda key: kmeans.seed(key, points, jnp.ones(3), 2))
    pair_KC = quick_jit(draw)(jax.random.split(new_key(0), 4000))
    of_zero = pair_KC[pair_KC[:, 0] == 0, 1]
    assert len(of_zero) > 1000
    share = np.mean(of_zero == 2)
    assert abs(share - 9 / 10) < 4 * np.sqrt(0.9 * 0.1 / len(of_zero))


@pytest.mark.parametrize('seed', range(3))
def test_three_planted_blobs_are_found(seed):
    middle = np.array([[0.0, 0], [10, 0], [0, 10]])
    blob = np.arange(60) % 3
    points = middle[blob] + 0.3 * np.random.default_rng(seed).normal(size=(60, 2))
    actual = fit(points, clusters=3, seed=seed)
    of_blob = [set(actual.assigned_N[blob == b].tolist()) for b in range(3)]
    assert all(len(one) == 1 for one in of_blob) and len(set.union(*of_blob)) == 3
    for b in range(3):
        assert_close(actual.centroid_CD[of_blob[b].pop()], points[blob == b].mean(axis=0))


def test_one_key_one_answer():
    one, same, other = (fit(cloud(), clusters=5, seed=seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.centroid_CD != other.centroid_CD).any()


def test_padding_changes_nothing():
    points, far = cloud(), np.full((20, 3), 1e4, np.float32)
    weights = np.repeat(np.float32([1, 0]), [40, 20])
    actual = fit(np.concatenate([points, far]), weights, clusters=5)
    assert abs(actual.centroid_CD).max() < 10
    for c in range(5):
        own = actual.assigned_N[:40] == c
        assert_close(actual.centroid_CD[c], points[own].mean(axis=0))


def test_as_many_clusters_as_points():
    points = cloud(6)
    actual = fit(points, clusters=6)
    assert sorted(actual.assigned_N.tolist()) == list(range(6))
    assert_close(actual.centroid_CD[actual.assigned_N], points)
    assert_close(actual.inertia_I, np.zeros(9))


def test_of_copies_the_clusters_left_over_stay_on_a_point():
    points = np.repeat(cloud(2), 5, axis=0)
    actual = fit(points, clusters=4)
    assert_close(actual.inertia_I, np.zeros(9))
    assert len(set(actual.assigned_N.tolist())) == 2
    distance_CN = abs(actual.centroid_CD[:, None] - points[None]).max(axis=2)
    assert distance_CN.min(axis=1).max() < 1e-6


def test_a_cluster_without_points_stays_where_it_is():
    points = np.array([[0.0], [2]], np.float32)
    centroids = np.array([[0.0], [100]], np.float32)
    assigned = jnp.zeros(2, jnp.int32)
    moved = kmeans._means(points, np.ones(2, np.float32), centroids, assigned)
    assert np.asarray(moved).tolist() == [[1], [100]]


def test_nearest_takes_the_first_of_equals_and_any_number_of_points(monkeypatch):
    monkeypatch.setattr(kmeans, 'CHUNK', 4)
    points, centroids = cloud(11), cloud(5, seed=1)
    centroids[4] = centroids[2]
    distances = [[sum((x - c) ** 2) for c in centroids] for x in points.astype(float)]
    expected = [int(np.argmin(one)) for one in distances]
    assert {0, 2} <= set(expected)
    for number in (1, 3, 4, 11):
        actual = quick_jit(kmeans.nearest)(points[:number], centroids)
        assert actual.tolist() == expected[:number]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_computes_in_float32(dtype):
    actual = fit(np.asarray(cloud(), dtype=jnp.dtype(dtype)), clusters=5)
    dtypes = [str(leaf.dtype) for leaf in actual]
    assert dtypes == ['float32', 'int32', 'float32']
    assert np.isfinite(actual.inertia_I).all()


@pytest.mark.parametrize('clusters', [0, 4])
def test_more_clusters_than_points_with_a_weight(clusters):
    with pytest.raises(ValueError, match=f'{clusters} clusters of 3 points'):
        fit(cloud(5), [1, 1, 0, 1, 0], clusters=clusters)
