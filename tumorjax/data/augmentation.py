"""nnU-Net's augmentations on the device: batched, jitted, a function of a key.

Order, probabilities and ranges are those of nnU-Net 2.8.1 (nnUNetTrainer.get_training_transforms,
isotropic patches) and stand in `DEFAULT`; every sample draws for itself whether a transform
applies and with which parameters. A transform whose probability is 0 is not in the compiled
program, and one that applies to no sample of a batch is skipped when it runs.

What differs from nnU-Net, and why:

- Images here are in [0, 1], nnU-Net's are z-scored, and two transforms depend on that: noise (its
  strength is in standard deviations) and brightness (which multiplies, so that zero stays). Both
  work as if the image had been z-scored, with the mean and std in `normalization`, or where those
  are None with the patch's own. The others give the same on either scale. As in nnU-Net,
  intensities may leave the range that they had.
- nnU-Net calls the noise's parameter a variance but uses it as the standard deviation
  (GaussianNoiseTransform in batchgeneratorsv2); so it is one here, and named so.
- Labels are sampled nearest; nnU-Net interpolates each class and takes the largest.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from tumorjax.data import augmentation_intensity as intensity
from tumorjax.data import augmentation_spatial as spatial
from tumorjax.errors import UserError

Images = Float[Array, "b x y z 1"]
Labels = UInt8[Array, "b x y z"]

# nnU-Net's numbers, in the order in which the transforms run. `channel_probability` is nnU-Net's
# second draw for each channel: CT has one channel, so blur runs in 0.2 * 0.5 of all samples.
DEFAULT: dict[str, Any] = {
    "rotation": {"probability": 0.2, "degrees": (-30.0, 30.0)},
    "scaling": {"probability": 0.2, "range": (0.7, 1.4)},
    # The patch that is read is this much larger than a rotated one. nnU-Net uses 0.85 whatever
    # the range of the scaling, so at the largest scale the patch's rim is padding.
    "source_scale": 0.85,
    "noise": {"probability": 0.1, "std": (0.0, 0.1)},
    "blur": {"probability": 0.2, "channel_probability": 0.5, "sigma": (0.5, 1.0)},
    "brightness": {"probability": 0.15, "range": (0.75, 1.25)},
    "contrast": {"probability": 0.15, "range": (0.75, 1.25)},
    "low_resolution": {"probability": 0.25, "channel_probability": 0.5, "scale": (0.5, 1.0)},
    "gamma_inverted": {"probability": 0.1, "range": (0.7, 1.5)},
    "gamma": {"probability": 0.3, "range": (0.7, 1.5)},
    "mirror_probability": 0.5,
    "mirror_axes": (0, 1, 2),
    # Intensities are seen as (image - mean) / std; None takes each patch's own.
    "normalization": {"mean": None, "std": None},
}
# What costs next to nothing beside a small network's step on a CPU.
CHEAP: dict[str, Any] = DEFAULT | {
    name: DEFAULT[name] | {"probability": 0.0}
    for name in ("rotation", "scaling", "blur", "low_resolution")
}

_TRANSFORMS = tuple(
    name for name, value in DEFAULT.items() if isinstance(value, dict) and "probability" in value
)
# Each transform's stream of random numbers keeps its number, whichever others are switched off.
_STREAM = {name: number for number, name in enumerate((*_TRANSFORMS, "mirror"))}


def without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns the settings with some transforms switched off.

    Args:
        settings: see `DEFAULT`; what is not named there has the default's value.
        names: transforms, keys of `DEFAULT`, or "mirror".

    Raises:
        UserError: a name or setting is unknown.
    """
    changed = check_settings(settings)
    for name in names:
        if name == "mirror":
            changed["mirror_axes"] = ()
        elif name in _TRANSFORMS:
            changed[name]["probability"] = 0.0
        else:
            raise UserError(
                f"augmentation has no transform {name!r}. Expected one of"
                f" {', '.join(_TRANSFORMS)} or mirror"
            )
    return changed


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings as plain values, completed from `DEFAULT`.

    Args:
        settings: the config's augmentation section, or parts of it.

    Raises:
        UserError: a key is unknown or a value is not usable.
    """
    complete = _completed(dict(settings), DEFAULT, "augmentation")
    for name in _TRANSFORMS:
        for key, value in complete[name].items():
            if key.endswith("probability"):
                _check_probability(value, f"augmentation.{name}.{key}")
            else:
                _check_range(value, f"augmentation.{name}.{key}")
    _check_probability(complete["mirror_probability"], "augmentation.mirror_probability")
    axes = complete["mirror_axes"]
    if len(set(axes)) < len(axes) or set(axes) - {0, 1, 2}:
        raise UserError(f"augmentation.mirror_axes is {axes}, expected some of 0, 1, 2")
    for key, low, high in (
        ("scaling.range", 0, np.inf),
        ("noise.std", None, np.inf),
        ("blur.sigma", 0, np.inf),
        ("low_resolution.scale", 0, 1),
        ("gamma.range", 0, np.inf),
        ("gamma_inverted.range", 0, np.inf),
    ):
        name, parameter = key.split(".")
        least, largest = complete[name][parameter]
        if largest > high or (low is not None and least <= low) or (low is None and least < 0):
            above = "of 0 or more" if low is None else "above 0"
            raise UserError(
                f"augmentation.{key} is {(least, largest)}, expected numbers {above}"
                + (f" and at most {high}" if high < np.inf else "")
            )
    if not complete["source_scale"] > 0:
        raise UserError(
            f"augmentation.source_scale is {complete['source_scale']}, expected above 0"
        )
    std = complete["normalization"]["std"]
    if std is not None and not std > 0:
        raise UserError(f"augmentation.normalization.std is {std}, expected above 0, or None")
    return complete


def source_patch(patch_size: Sequence[int], settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the size of the crops to load, so that a patch can be rotated and scaled.

    nnU-Net's initial patch size; the patch's own where neither rotation nor scaling is on.

    Args:
        patch_size: (x, y, z) voxels that augmentation leaves.
        settings: see `DEFAULT`.
    """
    settings = check_settings(settings)
    rotation, scaling = settings["rotation"], settings["scaling"]
    if not rotation["probability"] and not scaling["probability"]:
        x, y, z = (int(size) for size in patch_size)
        return x, y, z
    degrees = max(abs(angle) for angle in rotation["degrees"]) if rotation["probability"] else 0.0
    return spatial.rotated_extent(patch_size, degrees, settings["source_scale"])


def augment(
    key: Key[Array, ""],
    image: Images,
    label: Labels,
    settings: Mapping[str, Any] = DEFAULT,
    mirror_table: UInt8[np.ndarray, "classes+1"] | None = None,
    patch_size: Sequence[int] | None = None,
) -> tuple[Images, Labels]:
    """Augments a batch. Call it inside jit; all but the arrays is fixed when compiling.

    Sample i's random numbers depend on the key and on i in the whole batch, so a batch that is
    split over devices comes out as on one. Where devices are to share x, give each the whole source
    patches if rotation or scaling is on, which take voxels from everywhere; blur and low resolution
    gather the patch along x in the batches in which they apply. It has one channel.

    Args:
        key: of this step.
        image: [b, x, y, z, 1] source patches, in [0, 1].
        label: [b, x, y, z] class indices.
        settings: see `DEFAULT`.
        mirror_table: class index after mirroring x, from `anatomy.mirror_table`; needed where x
            can be mirrored.
        patch_size: voxels (x, y, z) to leave; the source's if None. See `source_patch`.

    Returns:
        Image [b, *patch_size, 1] and label [b, *patch_size].

    Raises:
        UserError: the settings are not usable.
    """
    settings = check_settings(settings)
    if 0 in settings["mirror_axes"] and mirror_table is None:
        raise UserError("mirroring across x needs the task's mirror_table; see anatomy")
    samples = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(image.shape[0]))
    patch = tuple(image.shape[1:4] if patch_size is None else patch_size)
    volume, label = _transform_space(samples, image[..., 0], label, settings, patch)
    for name, change in _intensity_changes(settings).items():
        probability = settings[name]["probability"] * settings[name].get("channel_probability", 1.0)
        volume = _sometimes(name, probability, change, samples, volume)
    volume, label = _mirror(samples, volume, label, settings, mirror_table)
    return volume[..., None], label


Change = Callable[[Key[Array, ""], Float[Array, "x y z"]], Float[Array, "x y z"]]


def _intensity_changes(settings: Mapping[str, Any]) -> dict[str, Change]:
    """Returns what each transform does to one volume, in nnU-Net's order."""
    mean, std = settings["normalization"]["mean"], settings["normalization"]["std"]

    def noise(key, image):
        key_std, key_noise = jax.random.split(key)
        unit = image.std() if std is None else std
        strength = _uniform(key_std, settings["noise"]["std"])
        return intensity.add_noise(key_noise, image, strength * unit)

    def blur(key, image):
        sigma = _uniform(key, settings["blur"]["sigma"], (3,))
        return intensity.blur(image, sigma, settings["blur"]["sigma"][1])

    def brightness(key, image):
        center = image.mean() if mean is None else mean
        return intensity.brightness(image, _factor(key, settings["brightness"]["range"]), center)

    def contrast(key, image):
        return intensity.contrast(image, _factor(key, settings["contrast"]["range"]))

    def low_resolution(key, image):
        return intensity.low_resolution(image, _uniform(key, settings["low_resolution"]["scale"]))

    def gamma_inverted(key, image):
        exponent = _factor(key, settings["gamma_inverted"]["range"])
        return intensity.gamma(image, exponent, invert=True)

    def gamma(key, image):
        return intensity.gamma(image, _factor(key, settings["gamma"]["range"]), invert=False)

    return {
        "noise": noise,
        "blur": blur,
        "brightness": brightness,
        "contrast": contrast,
        "low_resolution": low_resolution,
        "gamma_inverted": gamma_inverted,
        "gamma": gamma,
    }


def _sometimes(
    name: str,
    probability: float,
    change: Change,
    samples: Key[Array, "b"],
    volume: Float[Array, "b x y z"],
) -> Float[Array, "b x y z"]:
    """Changes each sample with a probability; no sample, no work."""
    if probability == 0:
        return volume
    keys, chosen = _choose(samples, name, probability)

    def changed(volume):
        return jnp.where(chosen[:, None, None, None], jax.vmap(change)(keys, volume), volume)

    return jax.lax.cond(chosen.any(), changed, lambda volume: volume, volume)


def _transform_space(
    samples: Key[Array, "b"],
    volume: Float[Array, "b x y z"],
    label: Labels,
    settings: Mapping[str, Any],
    patch: Sequence[int],
) -> tuple[Float[Array, "b x y z"], Labels]:
    """Rotates and scales some samples, and cuts the patch out of the middle of the others."""

    def crop(volume, label):
        cut = jax.vmap(lambda array: spatial.center_crop(array, patch))
        return cut(volume), cut(label)

    rotation, scaling = settings["rotation"], settings["scaling"]
    if not rotation["probability"] and not scaling["probability"]:
        return crop(volume, label)
    keys, rotated = _choose(samples, "rotation", rotation["probability"])
    radians = jax.vmap(lambda key: _uniform(key, np.deg2rad(rotation["degrees"]), (3,)))(keys)
    keys, scaled = _choose(samples, "scaling", scaling["probability"])
    scale = jax.vmap(lambda key: _uniform(key, scaling["range"]))(keys)
    matrices = jax.vmap(spatial.affine_matrix)(
        jnp.where(rotated[:, None], radians, 0), jnp.where(scaled, scale, 1)
    )
    chosen = rotated | scaled

    def transform(volume, label):
        cut = crop(volume, label)
        sample = functools.partial(spatial.resample, patch_size=patch)
        turned = jax.vmap(sample)(volume, label, matrices)
        return tuple(
            jnp.where(chosen[:, None, None, None], new, old)
            for new, old in zip(turned, cut, strict=True)
        )

    return jax.lax.cond(chosen.any(), transform, crop, volume, label)


def _mirror(
    samples: Key[Array, "b"],
    volume: Float[Array, "b x y z"],
    label: Labels,
    settings: Mapping[str, Any],
    mirror_table: UInt8[np.ndarray, "classes+1"] | None,
) -> tuple[Float[Array, "b x y z"], Labels]:
    axes, probability = settings["mirror_axes"], settings["mirror_probability"]
    if not axes or probability == 0:
        return volume, label

    def mirror(key, volume, label):
        flip = jax.random.bernoulli(key, probability, (len(axes),))
        return spatial.mirror(volume, label, axes, flip, mirror_table)

    keys, _ = _choose(samples, "mirror", 1.0)
    return jax.vmap(mirror)(keys, volume, label)


def _choose(
    samples: Key[Array, "b"], name: str, probability: float
) -> tuple[Key[Array, "b"], Bool[Array, "b"]]:
    """Returns a transform's key for each sample, and whether it applies."""

    def draw(sample):
        key, key_apply = jax.random.split(jax.random.fold_in(sample, _STREAM[name]))
        return key, jax.random.bernoulli(key_apply, probability)

    return jax.vmap(draw)(samples)


def _uniform(key: Key[Array, ""], limits: Sequence[float], shape: tuple[int, ...] = ()) -> Array:
    return jax.random.uniform(key, shape, minval=limits[0], maxval=limits[1])


def _factor(key: Key[Array, ""], limits: Sequence[float]) -> Float[Array, ""]:
    """Draws a factor: half of the draws below 1 and half above (batchgeneratorsv2's BGContrast)."""
    low, high = limits
    key_side, key_value = jax.random.split(key)
    above = _uniform(key_value, (max(low, 1.0), high))
    if low >= 1:
        return above
    below = _uniform(key_value, (low, 1.0))
    return jnp.where(jax.random.bernoulli(key_side), below, above)


def _completed(given: dict[str, Any], default: Mapping[str, Any], where: str) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(default)):
        raise UserError(
            f"{where}.{unknown[0]} is not a setting. Expected some of {', '.join(default)}"
        )
    complete: dict[str, Any] = {}
    for key, value in default.items():
        if isinstance(value, Mapping):
            complete[key] = _completed(dict(given.get(key, {})), value, f"{where}.{key}")
        elif isinstance(value, tuple):
            complete[key] = tuple(given.get(key, value))
        else:
            complete[key] = given.get(key, value)
    return complete


def _check_probability(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where} is {value!r}, expected 0 to 1")


def _check_range(value: Sequence[float], where: str) -> None:
    if len(value) != 2 or not value[0] <= value[1]:
        raise UserError(f"{where} is {value}, expected two numbers, the smaller first")
