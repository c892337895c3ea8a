"""Hospitals of the virtual abdomen: contrast phase, kernel, noise, spacing and file orientation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from jaxtyping import Float, Int16
from scipy import ndimage

Volume = Float[np.ndarray, "x y z"]


class Site(NamedTuple):
    """How one hospital scans.

    Attributes:
        phase: key of `PHASES`.
        noise: standard deviation in HU in mid-body, at the native voxel.
        kernel: key of `KERNELS`.
        in_plane, slice: place of its spacing in the settings' ranges, 0 the finest, 1 the coarsest.
        orientation: axis codes of its files, as nibabel gives them.
        offset: calibration error, HU.
        enhancement: factor on the uptake of contrast medium (tube voltage, dose of the medium).
        window_of_view: factor on the settings' extent.
        sform: whether files carry an sform beside the qform.
    """

    phase: str
    noise: float
    kernel: str
    in_plane: float
    slice: float
    orientation: str
    offset: float = 0.0
    enhancement: float = 1.0
    window_of_view: float = 1.0
    sform: bool = True


SITES: dict[str, Site] = {
    # Hospitals that a study may train on.
    "alder": Site("portal", 12, "standard", 0.4, 0.3, "LPS"),
    "birch": Site("portal", 16, "sharp", 0.1, 0.0, "RAS", offset=3, enhancement=1.08),
    "cedar": Site("arterial", 13, "smooth", 0.7, 0.5, "LAS", offset=-2),
    "dogwood": Site("delayed", 15, "standard", 0.3, 0.4, "LPI", window_of_view=0.96),
    "elm": Site("portal", 18, "smooth", 1.0, 0.8, "IPL", enhancement=0.85, sform=False),
    # Hospitals that it never sees.
    "juniper": Site("portal", 24, "sharp", 0.0, 0.2, "RPI", offset=9, enhancement=1.15),
    "larch": Site("early", 18, "smooth", 0.8, 1.0, "LPS", offset=-8, window_of_view=1.04),
    "maple": Site("delayed", 22, "standard", 0.6, 0.7, "ASR", enhancement=0.7, sform=False),
}
TRAINING_SITES = ("alder", "birch", "cedar", "dogwood", "elm")
OOD_SITES = ("juniper", "larch", "maple")

# Mean HU without contrast medium, of tissues that take it up.
NATIVE: dict[str, float] = {
    "liver": 56, "pancreas": 42, "cortex": 32, "medulla": 30, "spleen": 48, "aorta": 42,
    "postcava": 40, "portal": 40, "hepatic": 42, "muscle": 54, "wall": 40, "adrenal": 32,
    "uterus": 45, "heart": 42, "urine": 5,
}  # fmt: skip
# HU that the medium adds in each phase. Portal: 70 s after injection; early: late arterial at
# 30 s; arterial: pancreatic phase at 45 s; delayed: 180 s, with the first excretion.
PHASES: dict[str, dict[str, float]] = {
    "portal": {
        "liver": 56, "pancreas": 55, "cortex": 145, "medulla": 120, "spleen": 70, "aorta": 110,
        "postcava": 95, "portal": 130, "hepatic": 120, "muscle": 12, "wall": 45, "adrenal": 40,
        "uterus": 60, "heart": 105, "urine": 0,
    },
    "early": {
        "liver": 16, "pancreas": 62, "cortex": 125, "medulla": 40, "spleen": 75, "aorta": 250,
        "postcava": 45, "portal": 45, "hepatic": 12, "muscle": 4, "wall": 40, "adrenal": 45,
        "uterus": 35, "heart": 200, "urine": 0,
    },
    "arterial": {
        "liver": 34, "pancreas": 70, "cortex": 150, "medulla": 75, "spleen": 80, "aorta": 190,
        "postcava": 75, "portal": 110, "hepatic": 50, "muscle": 8, "wall": 50, "adrenal": 50,
        "uterus": 50, "heart": 150, "urine": 0,
    },
    "delayed": {
        "liver": 42, "pancreas": 40, "cortex": 115, "medulla": 118, "spleen": 52, "aorta": 75,
        "postcava": 75, "portal": 75, "hepatic": 75, "muscle": 12, "wall": 38, "adrenal": 30,
        "uterus": 65, "heart": 70, "urine": 260,
    },
}  # fmt: skip

# In-plane blur of the image in mm, gain of its edges, and the noise's grain: the width in voxels
# of its blur, and what part of a wider blur is taken from it (sharp kernels have little noise at
# low frequencies).
KERNELS: dict[str, dict[str, float]] = {
    "smooth": {"blur": 1.3, "edges": 0.0, "grain": 0.8, "high_pass": 0.0},
    "standard": {"blur": 0.8, "edges": 0.0, "grain": 0.5, "high_pass": 0.0},
    "sharp": {"blur": 0.5, "edges": 0.35, "grain": 0.3, "high_pass": 0.7},
}


class Grid(NamedTuple):
    """A scan's voxel grid in RAS+: centres are origin + index * spacing, mm."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

    def axes(self) -> list[Float[np.ndarray, "_"]]:
        """Returns the voxel centres along x, y and z, mm."""
        return [
            o + s * np.arange(n, dtype=np.float64)
            for n, s, o in zip(self.shape, self.spacing, self.origin, strict=True)
        ]


def scan_grid(rng: np.random.Generator, site: Site, settings: Mapping[str, Any]) -> Grid:
    """Returns the grid of one scan: the hospital's protocol with a little play for the patient.

    The body's frame has its origin at the first lumbar vertebra; the field of view is centred on
    the body in the plane and hangs below the diaphragm's dome.
    """
    fine, coarse = settings["in_plane_mm"]
    thin, thick = settings["slice_mm"]
    play = rng.uniform(-0.05, 0.05, 2)
    in_plane = fine + (coarse - fine) * float(np.clip(site.in_plane + play[0], 0, 1))
    thickness = thin + (thick - thin) * float(np.clip(site.slice + play[1], 0, 1))
    # Headers of real scans hold spacings to a few decimals.
    spacing = (round(in_plane, 3), round(in_plane, 3), round(thickness, 2))
    extent = [e * site.window_of_view for e in settings["extent_mm"]]
    counts = [max(8, round(e / s)) for e, s in zip(extent, spacing, strict=True)]
    if settings["matrix"]:
        counts[0] = counts[1] = settings["matrix"]
    size = [n * s for n, s in zip(counts, spacing, strict=True)]
    scale = settings["body_scale"]
    shift = rng.normal(0, 3, 3)
    low = [-size[0] / 2, 38 * scale - size[1] / 2, 148 * scale - size[2]]
    origin = tuple(
        round(float(a + s + g / 2), 3) for a, s, g in zip(low, shift, spacing, strict=True)
    )
    return Grid((counts[0], counts[1], counts[2]), spacing, (origin[0], origin[1], origin[2]))


def tissue_values(rng: np.random.Generator, site: Site, variation: float) -> dict[str, float]:
    """Returns the mean HU of each tissue for one scan.

    Args:
        rng: the patient's or scan's generator.
        site: phase and uptake.
        variation: scales the differences between patients; 1 gives about 15 % of the uptake.
    """
    uptake = site.enhancement * float(np.exp(rng.normal(0, 0.12 * variation)))
    values = {}
    for name, native in NATIVE.items():
        own = float(np.exp(rng.normal(0, 0.08 * variation)))
        values[name] = (
            native + rng.normal(0, 3 * variation) + PHASES[site.phase][name] * uptake * own
        )
    # One liver in six is fatty.
    values["liver"] -= variation * float(rng.uniform(10, 30)) * (rng.random() < 1 / 6)
    values["fat"] = -104 + rng.normal(0, 4 * variation)
    values["marrow"] = 190 + rng.normal(0, 35 * variation)
    return values


def reconstruct(image: Volume, spacing: tuple[float, float, float], site: Site) -> None:
    """Blurs the ideal image to what the kernel and the slice profile let through, in place."""
    kernel = KERNELS[site.kernel]
    # 0.3 voxels: a voxel's own averaging, so that borders have partial volume.
    in_plane = float(np.hypot(kernel["blur"] / spacing[0], 0.3))
    for start in range(0, image.shape[0], 32):
        block = image[start : start + 32]
        block[...] = ndimage.gaussian_filter1d(block, 0.35, axis=2)
    for k in range(image.shape[2]):
        plane = ndimage.gaussian_filter(image[:, :, k], in_plane)
        if kernel["edges"]:
            plane += kernel["edges"] * (plane - ndimage.gaussian_filter(plane, 1.5 * in_plane))
        image[:, :, k] = plane


def add_noise(
    image: Volume, seed: list[int], grid: Grid, site: Site, scale: float, body_scale: float
) -> None:
    """Adds the scan's noise and calibration error, in place, one slice at a time.

    Noise is strongest in mid-body, where the fewest photons arrive, and about half of that in
    the air around.

    Args:
        image: HU.
        seed: of the scan; each slice has its own stream.
        grid: voxel grid.
        site: noise and kernel.
        scale: factor on the noise.
        body_scale: size of the body, 1 for an adult.
    """
    kernel = KERNELS[site.kernel]
    x, y, _ = grid.axes()
    r2 = (x[:, None] / (150 * body_scale)) ** 2
    r2 = r2 + ((y[None, :] - 33 * body_scale) / (105 * body_scale)) ** 2
    amplitude = (site.noise * scale * (0.5 + 0.55 * np.exp(-0.8 * r2))).astype(np.float32)
    for k in range(image.shape[2]):
        rng = np.random.default_rng([*seed, k])
        white = rng.standard_normal(image.shape[:2], dtype=np.float32)
        noise = ndimage.gaussian_filter(white, kernel["grain"], mode="wrap")
        if kernel["high_pass"]:
            noise -= kernel["high_pass"] * ndimage.gaussian_filter(white, 2.0, mode="wrap")
        image[:, :, k] += amplitude * (noise / noise.std()) + np.float32(site.offset)


def to_file(
    array: Float[np.ndarray, "x y z"] | Int16[np.ndarray, "x y z"], grid: Grid, site: Site
) -> nib.Nifti1Image:
    """Returns a RAS+ array as a NIfTI image in the hospital's own orientation.

    The affine says where each voxel lies, so that reading it back to RAS+ gives the same array.
    """
    affine = np.diag([*grid.spacing, 1.0])
    affine[:3, 3] = grid.origin
    wanted = nib.orientations.axcodes2ornt(tuple(site.orientation))
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)
    turned = nib.orientations.apply_orientation(array, turn)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    image = nib.Nifti1Image(turned, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine if site.sform else None, code=1 if site.sform else 0)
    image.header.set_xyzt_units("mm")
    return image
