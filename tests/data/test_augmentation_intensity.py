"""Each intensity transform against scipy or a closed form, and against nnU-Net's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tumorjax.data import augmentation_intensity as intensity

SHAPE = (22, 17, 13)


@pytest.fixture
def image(rng) -> np.ndarray:
    return rng.uniform(0, 1, SHAPE).astype(np.float32)


@pytest.mark.parametrize("sigma", [(0.5, 0.75, 1.0), (0.58, 0.59, 0.9), (1.0, 1.0, 1.0)])
def test_blur_is_scipys_gaussian_with_reflected_borders(image, sigma):
    expected = image.astype(float)
    for axis, s in enumerate(sigma):
        reach = int(np.floor(3 * s + 0.25))
        expected = scipy.ndimage.gaussian_filter1d(
            expected, s, axis=axis, mode="mirror", radius=reach
        )
    result = intensity.blur(jnp.asarray(image), jnp.asarray(sigma), 1.0)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_blur_keeps_a_flat_image_and_lowers_the_noise(image):
    flat = jnp.full(SHAPE, 0.7)
    np.testing.assert_allclose(intensity.blur(flat, jnp.ones(3), 1.0), 0.7, rtol=1e-6)
    blurred = np.asarray(intensity.blur(jnp.asarray(image), jnp.ones(3), 1.0))
    # White noise through a Gaussian of sigma 1 keeps (2 sqrt(pi))^-1.5 = 0.15 of its std.
    assert blurred[4:-4, 4:-4, 4:-4].std() / image.std() == pytest.approx(0.15, abs=0.03)


def test_blur_works_on_volumes_thinner_than_the_kernel():
    thin = jnp.linspace(0, 1, 2 * 5).reshape(2, 5, 1)
    result = np.asarray(intensity.blur(thin, jnp.ones(3), 1.0))
    assert np.isfinite(result).all()
    assert 0 <= result.min() <= result.max() <= 1


@pytest.mark.parametrize("scale", [0.5, 0.61, 0.77, 0.93, 1.0])
def test_low_resolution_is_nearest_down_and_linear_up(image, scale):
    expected = image.astype(float)
    for axis, size in enumerate(SHAPE):
        reduced = round(size * scale)
        source = np.floor((np.arange(reduced) + 0.5) * size / reduced).astype(int)
        coarse = np.take(expected, source, axis)
        place = (np.arange(size) + 0.5) * reduced / size - 0.5
        expected = np.apply_along_axis(
            lambda line, place=place: np.interp(place, np.arange(len(line)), line), axis, coarse
        )
    result = intensity.low_resolution(jnp.asarray(image), jnp.float32(scale))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    if scale == 1.0:
        np.testing.assert_allclose(result, image, atol=1e-6)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_brightness_multiplies_as_seen_from_the_centre(image, factor):
    result = intensity.brightness(jnp.asarray(image), jnp.float32(factor), 0.4)
    np.testing.assert_allclose(result, 0.4 + factor * (image - 0.4), rtol=1e-5)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_keeps_the_range(image, factor):
    result = np.asarray(intensity.contrast(jnp.asarray(image), jnp.float32(factor)))
    stretched = image.mean() + factor * (image - image.mean())
    np.testing.assert_allclose(result, stretched.clip(image.min(), image.max()), atol=1e-6)
    assert result.min() >= image.min()
    assert result.max() <= image.max()


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5])
def test_gamma_bends_intensities_and_keeps_mean_and_std(image, exponent, invert):
    result = np.asarray(intensity.gamma(jnp.asarray(image), jnp.float32(exponent), invert))
    assert result.mean() == pytest.approx(image.mean(), abs=1e-5)
    assert result.std() == pytest.approx(image.std(), abs=1e-5)
    scaled = (image.astype(float) - image.min()) / np.ptp(image)
    bent = 1 - (1 - scaled) ** exponent if invert else scaled**exponent
    # Up to a line, which mean and std fix.
    expected = (bent - bent.mean()) / bent.std() * image.std() + image.mean()
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_flat_patch_stays_as_it_is():
    flat = jnp.full(SHAPE, 0.25)
    for result in (
        intensity.gamma(flat, jnp.float32(1.5), False),
        intensity.gamma(flat, jnp.float32(0.7), True),
        intensity.contrast(flat, jnp.float32(1.2)),
        intensity.low_resolution(flat, jnp.float32(0.6)),
    ):
        np.testing.assert_allclose(result, 0.25, rtol=1e-5)


def test_noise_is_gaussian_and_white(image):
    noise = np.asarray(intensity.add_noise(jax.random.key(1), jnp.asarray(image), 0.1)) - image
    assert noise.mean() == pytest.approx(0, abs=0.006)
    assert noise.std() == pytest.approx(0.1, rel=0.04)
    assert (np.abs(noise) > 0.196).mean() == pytest.approx(0.05, abs=0.013)
    assert np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1] == pytest.approx(0, abs=0.06)


# Against nnU-Net's own transforms (batchgeneratorsv2), where it is installed.


def reference(transform, image, **parameters) -> np.ndarray:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(image.copy())[None]
    return transform._apply_to_image(tensor, **parameters)[0].numpy()


@pytest.mark.parametrize("sigma", [(0.5, 0.75, 1.0), (0.51, 0.62, 0.88)])
def test_blur_is_nnunets(image, sigma):
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

    expected = reference(
        GaussianBlurTransform(), image, apply_to_channel=np.array([True]), sigmas=[sigma]
    )
    result = intensity.blur(jnp.asarray(image), jnp.asarray(sigma), 1.0)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.61, 0.77, 0.93])
def test_low_resolution_is_nnunets(image, scale):
    torch = pytest.importorskip("torch")
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

    transform = SimulateLowResolutionTransform((0.5, 1), False, True, None)
    expected = reference(transform, image, apply_to_channel=[0], scales=torch.tensor([[scale] * 3]))
    result = intensity.low_resolution(jnp.asarray(image), jnp.float32(scale))
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("factor", [0.76, 1.21])
def test_brightness_and_contrast_are_nnunets(image, factor):
    torch = pytest.importorskip("torch")
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform

    parameters = {"apply_to_channel": torch.tensor([0]), "multipliers": torch.tensor([factor])}
    # nnU-Net's image is z-scored: multiplying it is our brightness about the mean.
    mean, std = image.mean(), image.std()
    scored = (image - mean) / std
    expected = reference(MultiplicativeBrightnessTransform((1, 1), False), scored, **parameters)
    result = intensity.brightness(jnp.asarray(image), jnp.float32(factor), mean)
    np.testing.assert_allclose((np.asarray(result) - mean) / std, expected, atol=1e-5)

    expected = reference(ContrastTransform((1, 1), True, False), scored, **parameters)
    result = intensity.contrast(jnp.asarray(image), jnp.float32(factor))
    np.testing.assert_allclose((np.asarray(result) - mean) / std, expected, atol=1e-5)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("exponent", [0.72, 1.4])
def test_gamma_is_nnunets(image, exponent, invert):
    torch = pytest.importorskip("torch")
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform

    mean, std = image.mean(), image.std()
    expected = reference(
        GammaTransform((1, 1), 0, False, 1, 1),
        (image - mean) / std,
        apply_to_channel=torch.tensor([0]),
        retain_stats=torch.tensor([True]),
        invert_image=torch.tensor([invert]),
        gamma=torch.tensor([exponent]),
    )
    result = intensity.gamma(jnp.asarray(image), jnp.float32(exponent), invert)
    np.testing.assert_allclose((np.asarray(result) - mean) / std, expected, atol=1e-4)


def test_noises_number_is_a_standard_deviation_in_nnunet_too():
    torch = pytest.importorskip("torch")
    pytest.importorskip("batchgeneratorsv2")
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform

    torch.manual_seed(0)
    transform = GaussianNoiseTransform(noise_variance=(0.1, 0.1))
    noise = transform(image=torch.zeros(1, 40, 40, 40))["image"].numpy()
    assert noise.std() == pytest.approx(0.1, rel=0.02)  # not sqrt(0.1) = 0.32
