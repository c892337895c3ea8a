"""nnU-Net's segmentation loss: soft Dice plus cross-entropy, at every level of the decoder."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def soft_dice(
    logits: Float[Array, "b x y z classes"],
    label: Int[Array, "b x y z"],
    *,
    batch: bool = False,
    smooth: float = 1e-5,
) -> Float[Array, ""]:
    """One minus the soft Dice score of the foreground classes.

    Args:
        logits: of all classes; background is class 0 and left out.
        label: class indices.
        batch: sum over the batch before dividing, instead of a score for each sample.
        smooth: added to numerator and denominator.

    Returns:
        0 for a perfect match. nnU-Net's loss is this minus one; the gradient is the same.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))[..., 1:]
    truth = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)[..., 1:]
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    intersection = (probabilities * truth).sum(axes)
    total = probabilities.sum(axes) + truth.sum(axes)
    return 1 - ((2 * intersection + smooth) / jnp.maximum(total + smooth, 1e-8)).mean()


def cross_entropy(
    logits: Float[Array, "b x y z classes"], label: Int[Array, "b x y z"]
) -> Float[Array, ""]:
    """Mean over voxels of the negative log probability of the true class."""
    logits = logits.astype(jnp.float32)
    truth = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
    return (jax.nn.logsumexp(logits, axis=-1) - (logits * truth).sum(-1)).mean()


def level_weights(levels: int) -> tuple[float, ...]:
    """Weights 1, 1/2, 1/4, ... that sum to 1, with none for the lowest of several levels."""
    weights = [0.5**level for level in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def segmentation_loss(
    logits: Float[Array, "b x y z classes"] | Sequence[Float[Array, "b _x _y _z classes"]],
    label: Int[Array, "b x y z"],
    *,
    batch_dice: bool = False,
) -> Float[Array, ""]:
    """Soft Dice plus cross-entropy, summed over the levels with `level_weights`.

    Args:
        logits: of one level or of several, finest first.
        label: class indices at the finest level; coarser ones take every second voxel and so on,
            as nearest-neighbour resizing does.
        batch_dice: see `soft_dice`.
    """
    levels = logits if isinstance(logits, list | tuple) else [logits]
    total = jnp.zeros(())
    for level, weight in zip(levels, level_weights(len(levels)), strict=True):
        if weight == 0:
            continue
        steps = [n // m for n, m in zip(label.shape[1:], level.shape[1:4], strict=True)]
        # The centre of a block of s voxels is s / 2: nearest resizing takes voxel s // 2.
        coarse = label[
            :,
            steps[0] // 2 :: steps[0],
            steps[1] // 2 :: steps[1],
            steps[2] // 2 :: steps[2],
        ]
        loss = soft_dice(level, coarse, batch=batch_dice) + cross_entropy(level, coarse)
        total = total + weight * loss
    return total


def dice_per_class(
    logits: Float[Array, "b x y z classes"], label: Int[Array, "b x y z"]
) -> Float[Array, "classes-1"]:
    """Dice of the predicted labels over the batch, NaN for a class that is in neither."""
    classes = logits.shape[-1]
    prediction = logits.argmax(-1)
    indices = jnp.arange(1, classes)
    predicted = prediction[..., None] == indices
    true = label[..., None] == indices
    axes = (0, 1, 2, 3)
    return 2 * (predicted & true).sum(axes) / (predicted.sum(axes) + true.sum(axes))
