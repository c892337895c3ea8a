"""The codebook: nearest codes, moving averages, restarts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.synthesis import vector_quantization as vq


def test_nearest_is_what_all_distances_say(rng):
    codes = rng.standard_normal((37, 5)).astype(np.float32)
    z = rng.standard_normal((2, 6, 5, 4, 5)).astype(np.float32)
    distances = np.linalg.norm(z[..., None, :] - codes, axis=-1)
    found = jax.jit(vq.nearest)(codes, z)
    np.testing.assert_array_equal(found, distances.argmin(-1))


def test_nearest_works_in_chunks(rng, monkeypatch):
    codes = rng.standard_normal((9, 3)).astype(np.float32)
    z = rng.standard_normal((50, 3)).astype(np.float32)
    whole = jax.jit(vq.nearest)(codes, z)
    monkeypatch.setattr(vq, "_CHUNK", 7)
    np.testing.assert_array_equal(jax.jit(vq.nearest)(codes, z), whole)


def test_first_codes_are_latents_of_the_batch(rng):
    z = rng.standard_normal((4, 3, 3, 3, 2)).astype(np.float32)
    book = jax.jit(vq.initialise)(jax.random.key(0), vq.empty(20, 2), jnp.asarray(z))
    rows = {tuple(row) for row in z.reshape(-1, 2).tolist()}
    drawn = [tuple(row) for row in np.asarray(book["embeddings"]).tolist()]
    assert set(drawn) <= rows
    assert len(set(drawn)) == 20  # none twice


def test_more_codes_than_latents_are_evenly_shared_with_jitter(rng):
    z = rng.standard_normal((10, 2)).astype(np.float32) * 100
    book = jax.jit(vq.initialise)(jax.random.key(0), vq.empty(30, 2), jnp.asarray(z))
    codes = np.asarray(book["embeddings"])
    nearest = np.linalg.norm(codes[:, None] - z, axis=-1).argmin(1)
    np.testing.assert_array_equal(np.bincount(nearest, minlength=10), 3)
    assert len(np.unique(codes, axis=0)) == 30


def test_codes_become_the_means_of_their_latents(rng):
    """With the same latents in each batch counts and codes converge to theirs geometrically."""
    centers = np.array([[5.0, 0.0], [-5.0, 1.0], [0.0, 7.0]], np.float32)
    groups = [
        c + rng.standard_normal((n, 2)).astype(np.float32)
        for c, n in zip(centers, (30, 20, 10), strict=True)
    ]
    z = np.concatenate(groups)
    book = {
        "embeddings": jnp.asarray(centers),
        "counts": jnp.ones(3),
        "sums": jnp.asarray(centers),
    }
    step = jax.jit(
        lambda key, book, z: vq.update(key, book, z, vq.nearest(book["embeddings"], z), decay=0.9)
    )
    for i in range(100):
        book = step(jax.random.key(i), book, z)
    np.testing.assert_allclose(book["counts"], [30, 20, 10], rtol=1e-3)
    np.testing.assert_allclose(
        book["embeddings"], [g.mean(0) for g in groups], rtol=1e-3, atol=1e-3
    )


def test_one_update_is_that_of_the_formula(rng):
    z = rng.standard_normal((40, 3)).astype(np.float32)
    codes = rng.standard_normal((4, 3)).astype(np.float32)
    book = {
        "embeddings": jnp.asarray(codes),
        "counts": jnp.full(4, 5.0),
        "sums": jnp.asarray(5 * codes),
    }
    indices = np.arange(40) % 4
    new = jax.jit(vq.update)(jax.random.key(0), book, z, jnp.asarray(indices))
    counts = 0.99 * 5 + 0.01 * 10
    sums = 0.99 * 5 * codes + 0.01 * np.stack([z[indices == k].sum(0) for k in range(4)])
    np.testing.assert_allclose(new["counts"], counts, rtol=1e-6)
    np.testing.assert_allclose(new["embeddings"], sums / counts, rtol=1e-5, atol=1e-6)


def test_unused_codes_start_anew_at_latents_and_used_ones_stay(rng):
    z = rng.standard_normal((64, 2)).astype(np.float32)
    codes = np.array([[0.0, 0.0], [100.0, 100.0], [-100.0, 50.0]], np.float32)
    book = {
        "embeddings": jnp.asarray(codes),
        "counts": jnp.array([50.0, 1.0, 1.0]),
        "sums": jnp.asarray(codes),
    }
    indices = jax.jit(vq.nearest)(book["embeddings"], z)
    assert not np.asarray(indices).any()
    new = np.asarray(jax.jit(vq.update)(jax.random.key(1), book, z, indices)["embeddings"])
    assert np.linalg.norm(new[0]) < 1
    for code in new[1:]:
        assert np.linalg.norm(z - code, axis=1).min() == 0
    kept = vq.update(jax.random.key(1), book, z, indices, least_use=0.5)["embeddings"]
    np.testing.assert_allclose(kept[1:], codes[1:], rtol=2e-2)


def test_perplexity_counts_codes_that_are_used_alike():
    assert float(vq.perplexity(jnp.arange(64) % 16, 100)) == pytest.approx(16, rel=1e-5)
    assert float(vq.perplexity(jnp.zeros(64, int), 100)) == pytest.approx(1, rel=1e-5)
