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
    absent: bool = True,
    smooth: float = 1e-5,
) -> Float[Array, ""]:
    """One minus the soft Dice score of the foreground classes.

    Args:
        logits: of all classes; background is class 0 and left out.
        label: class indices.
        batch: sum over the batch before dividing, instead of a score for each sample.
        absent: count classes that are not in the label, whose score is about 0 until nothing of
            them is predicted (nnU-Net's way). Left out, they are held down by cross-entropy
            alone; with many classes and small batches rare classes are then learned sooner.
        smooth: added to numerator and denominator.

    Returns:
        0 for a perfect match. nnU-Net's loss is this minus one; the gradient is the same.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))[..., 1:]
    truth = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)[..., 1:]
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    intersection = (probabilities * truth).sum(axes)
    total = probabilities.sum(axes) + truth.sum(axes)
    score = (2 * intersection + smooth) / jnp.maximum(total + smooth, 1e-8)
    if absent:
        return 1 - score.mean()
    present = truth.sum(axes) > 0
    # Nothing but background: no score, and no gradient, instead of 0 / 0.
    return jnp.where(present, 1 - score, 0).sum() / jnp.maximum(present.sum(), 1)


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
    absent_dice: bool = True,
    cross_entropy_weight: float = 1.0,
) -> Float[Array, ""]:
    """Soft Dice plus cross-entropy, summed over the levels with `level_weights`.

    Args:
        logits: of one level or of several, finest first.
        label: class indices at the finest level; coarser ones take every second voxel and so on,
            as nearest-neighbour resizing does.
        batch_dice: `batch` of `soft_dice`.
        absent_dice: `absent` of `soft_dice`.
        cross_entropy_weight: of cross-entropy beside Dice. At 1 (nnU-Net's) the background's many
            voxels first drive small classes to zero, and short trainings never see them again.
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
        dice = soft_dice(level, coarse, batch=batch_dice, absent=absent_dice)
        total = total + weight * (dice + cross_entropy_weight * cross_entropy(level, coarse))
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
