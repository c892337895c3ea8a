"""The codebook of a vector-quantised autoencoder: nearest codes, and how codes follow the latents.

Codes are moving averages of the latents that they stand for, not parameters with a gradient. Those
that hardly any latent is near to are put where latents are.

Source: van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017, appendix A.1;
restarts as in Dhariwal et al., "Jukebox", 2020. The numbers are DiffTumor's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# How many latents are compared with the whole codebook at a time: 128 MB with 16,384 codes.
_CHUNK = 2048
# Of the noise on latents that become codes where there are more codes than latents.
_JITTER = 0.01
_EPSILON = 1e-7

Codebook = dict[str, Array]


def empty(codes: int, channels: int) -> Codebook:
    """Returns a codebook before its first batch.

    Returns:
        embeddings [codes, channels]; counts [codes], the moving average of how many latents of a
        batch each code stands for; sums [codes, channels], that of their sum.
    """
    return {
        "embeddings": jnp.zeros((codes, channels)),
        "counts": jnp.ones(codes),
        "sums": jnp.zeros((codes, channels)),
    }


def initialise(key: Array, codebook: Codebook, z: Float[Array, "*n c"]) -> Codebook:
    """Returns a codebook whose codes are latents of a batch, drawn at random."""
    drawn = _draw(key, z.reshape(-1, z.shape[-1]), len(codebook["counts"]))
    return {"embeddings": drawn, "counts": jnp.ones(len(drawn)), "sums": drawn}


def nearest(embeddings: Float[Array, "k c"], z: Float[Array, "*n c"]) -> Int[Array, "*n"]:
    """Returns the index of the code that is nearest to each latent."""
    flat = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    squares = jnp.square(embeddings).sum(-1)

    def of_one(latent: Float[Array, "c"]) -> Int[Array, ""]:
        # The latent's own square is the same for all codes.
        products = jnp.matmul(embeddings, latent, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(squares - 2 * products)

    return jax.lax.map(of_one, flat, batch_size=_CHUNK).reshape(z.shape[:-1])


def update(
    key: Array,
    codebook: Codebook,
    z: Float[Array, "*n c"],
    indices: Int[Array, "*n"],
    *,
    decay: float = 0.99,
    least_use: float = 1.0,
) -> Codebook:
    """Returns the codebook after a batch.

    Args:
        key: decides which latents replace unused codes.
        codebook: from `initialise` or `update`.
        z: the batch's latents.
        indices: of the codes that they were given.
        decay: of the moving averages.
        least_use: a code with a lower count is put at a latent of this batch.
    """
    flat, codes = z.reshape(-1, z.shape[-1]), len(codebook["counts"])
    rows = indices.reshape(-1)
    used = jnp.zeros(codes).at[rows].add(1.0)
    totals = jnp.zeros_like(codebook["sums"]).at[rows].add(flat)
    counts = decay * codebook["counts"] + (1 - decay) * used
    sums = decay * codebook["sums"] + (1 - decay) * totals
    # Laplace smoothing, which keeps the sum of the counts.
    total = counts.sum()
    smoothed = (counts + _EPSILON) / (total + codes * _EPSILON) * total
    moved = sums / smoothed[:, None]
    embeddings = jnp.where(counts[:, None] >= least_use, moved, _draw(key, flat, codes))
    return {"embeddings": embeddings, "counts": counts, "sums": sums}


def perplexity(indices: Int[Array, "*n"], codes: int) -> Float[Array, ""]:
    """Returns how many codes a batch uses, as the exponential of their distribution's entropy."""
    shares = jnp.zeros(codes).at[indices.reshape(-1)].add(1.0) / indices.size
    return jnp.exp(-jnp.where(shares > 0, shares * jnp.log(shares + 1e-30), 0).sum())


def latent_range(codebook: dict[str, Any]) -> tuple[float, float]:
    """Returns the least and the greatest number in the codes, DiffTumor's scale of latents."""
    embeddings = codebook["embeddings"]
    return float(embeddings.min()), float(embeddings.max())


def _draw(key: Array, flat: Float[Array, "n c"], count: int) -> Float[Array, "count c"]:
    """Draws `count` rows: each at most once, or where there are fewer, evenly and with jitter."""
    size, channels = flat.shape
    of_rows, of_noise = jax.random.split(key)
    rows = jax.random.permutation(of_rows, max(size, count))[:count] % size
    drawn = jax.lax.stop_gradient(flat[rows].astype(jnp.float32))
    if size >= count:
        return drawn
    return drawn + jax.random.normal(of_noise, drawn.shape) * (_JITTER / channels**0.5)
