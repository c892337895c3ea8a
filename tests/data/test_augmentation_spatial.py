"""Rotation, scaling and mirroring against scipy, and against nnU-Net's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from tumorjax import anatomy
from tumorjax.data import augmentation_spatial as spatial

SOURCE, PATCH = (25, 22, 19), (16, 15, 12)
ANGLES = (0.4, -0.3, 0.5)
SCALES = (0.7, 1.0, 1.4)

sample = jax.jit(spatial.resample, static_argnames="patch_size")


@pytest.fixture
def volume(rng) -> tuple[np.ndarray, np.ndarray]:
    image = rng.uniform(0, 1, SOURCE).astype(np.float32)
    return image, rng.integers(0, 5, SOURCE, dtype=np.uint8)


def matrix_of(angles, scale):
    return spatial.affine_matrix(jnp.asarray(angles, jnp.float32), jnp.float32(scale))


def test_the_matrix_turns_about_x_then_y_then_z_and_scales():
    expected = Rotation.from_euler("xyz", ANGLES).as_matrix() * 1.3
    np.testing.assert_allclose(matrix_of(ANGLES, 1.3), expected, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("angles", [ANGLES, (0.02, -0.01, -0.52)])
def test_sampling_is_scipys_affine_transform(volume, angles, scale):
    image, label = volume
    matrix = np.asarray(matrix_of(angles, scale), float)
    centers = [(np.array(shape) - 1) / 2 for shape in (SOURCE, PATCH)]
    settings = {
        "offset": centers[0] - matrix @ centers[1],
        "output_shape": PATCH,
        "mode": "grid-constant",
        "cval": 0,
    }
    result, classes = sample(image, label, matrix, PATCH)
    expected = scipy.ndimage.affine_transform(image, matrix, order=1, **settings)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    expected = scipy.ndimage.affine_transform(label, matrix, order=0, **settings)
    # Half-way between two voxels rounding decides, here and there.
    assert (np.asarray(classes) != expected).mean() < 0.003
    assert classes.dtype == jnp.uint8


def test_without_rotation_and_scale_the_middle_is_cut_out(volume):
    image, label = volume
    patch = (15, 14, 11)  # the same parity as the source: voxel centres coincide
    result, classes = sample(image, label, np.eye(3, dtype=np.float32), patch)
    np.testing.assert_allclose(result, spatial.center_crop(image, patch), atol=1e-6)
    np.testing.assert_array_equal(classes, spatial.center_crop(label, patch))


def test_larger_scales_make_things_smaller():
    z, y, x = np.mgrid[:41, :41, :41] - 20
    ball = (x**2 + y**2 + z**2 <= 10**2).astype(np.uint8)
    for scale in SCALES:
        _, classes = sample(
            ball.astype(np.float32), ball, np.asarray(matrix_of((0, 0, 0), scale)), (41, 41, 41)
        )
        radius = (float(classes.sum()) * 3 / 4 / np.pi) ** (1 / 3)
        assert radius == pytest.approx(10 / scale, rel=0.03)


def test_image_and_label_turn_together():
    rng = np.random.default_rng(2)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 4)
    mask = (smooth > 0).astype(np.uint8)
    image, label = sample(
        mask.astype(np.float32), mask, np.asarray(matrix_of(ANGLES, 0.9)), (24, 24, 24)
    )
    assert ((np.asarray(image) > 0.5) != np.asarray(label)).mean() < 0.03
    assert 0.2 < np.asarray(label).mean() < 0.8


@pytest.mark.parametrize(
    ("patch", "extent"),
    [
        # nnU-Net 2.8.1, get_patch_size with 30 degrees about each axis and (0.85, 1.25).
        ((96, 96, 96), (154, 154, 154)),
        ((128, 128, 128), (205, 205, 205)),
        ((32, 32, 32), (51, 51, 51)),
        ((48, 48, 48), (77, 77, 77)),
        ((160, 96, 112), (219, 163, 208)),
        ((80, 192, 160), (194, 289, 210)),
    ],
)
def test_the_source_patch_is_nnunets(patch, extent):
    assert spatial.rotated_extent(patch, 30, 0.85) == extent


def test_mirroring_x_swaps_left_and_right(rng):
    classes = {
        "kidney_left": ("kidney_left",),
        "liver": ("liver",),
        "kidney_right": ("kidney_right",),
    }
    table = anatomy.mirror_table(classes)
    label = rng.integers(0, 4, (6, 5, 4), dtype=np.uint8)
    image = rng.uniform(0, 1, label.shape).astype(np.float32)
    swap = np.array([0, 3, 2, 1], np.uint8)
    for flips in np.ndindex(2, 2, 2):
        axes = [axis for axis in range(3) if flips[axis]]
        result = spatial.mirror(image, label, (0, 1, 2), jnp.array(flips, bool), table)
        np.testing.assert_array_equal(result[0], np.flip(image, axes))
        expected = np.flip(label, axes)
        np.testing.assert_array_equal(result[1], swap[expected] if flips[0] else expected)
        again = spatial.mirror(*result, (0, 1, 2), jnp.array(flips, bool), table)
        np.testing.assert_array_equal(again[1], label)


# Against nnU-Net's own transform (batchgeneratorsv2), where it is installed.


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("angles", [ANGLES, (-0.5, 0.2, 0.1)])
def test_sampling_is_nnunets(volume, angles, scale):
    torch = pytest.importorskip("torch")
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    image, label = volume
    transform = SpatialTransform(
        PATCH, 0, False, p_rotation=1, rotation=lambda dim, **_: angles[dim], p_scaling=1,
        scaling=scale, p_synchronize_scaling_across_axes=1, mode_seg="nearest",
    )  # fmt: skip
    result = transform(
        image=torch.from_numpy(image)[None], segmentation=torch.from_numpy(label.astype(int))[None]
    )
    ours, classes = sample(image, label, np.asarray(matrix_of(angles, scale)), PATCH)
    np.testing.assert_allclose(ours, result["image"][0], atol=2e-5)
    assert (np.asarray(classes) != result["segmentation"][0].numpy()).mean() < 0.003


def test_the_crop_without_rotation_is_nnunets(volume):
    torch = pytest.importorskip("torch")
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    image, _ = volume
    for patch in (PATCH, (25, 21, 8), (16, 22, 19)):
        transform = SpatialTransform(patch, 0, False)
        expected = transform(image=torch.from_numpy(image)[None])["image"][0]
        np.testing.assert_array_equal(spatial.center_crop(image, patch), expected)
