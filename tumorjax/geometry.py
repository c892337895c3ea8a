"""Orientation, spacing and resampling of volumes. Orientation is handled here and nowhere else.

Arrays are [x, y, z], spacings (x, y, z) in mm, affines those of NIfTI: from voxel index to mm in
RAS+, voxel centres at whole indices.

Resampling keeps the physical extent: the outer faces of the first and the last voxel of the new
grid lie on those of the old one. A new axis has round(length / new spacing) voxels, so its true
spacing (`resampled_spacing`) differs from the one asked for by at most half a voxel over the whole
axis. Voxel o of the new axis has its centre at (o + 0.5) * old / new - 0.5 of the old one; beyond
the faces the volume is continued by reflection. Going back to the first shape is the same function.

Weights are one small matrix per axis, cut into bands, so that all work is matrix products of BLAS.
A volume is worked through in slabs across its slowest axis, and memory beyond input and output is
that of a slab, some tens of MB.
"""

from collections.abc import Callable, Iterator, Sequence

import nibabel.orientations as orientations
import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped, UInt8
from scipy import ndimage
from threadpoolctl import threadpool_limits

from tumorjax.errors import UserError

Affine = Float[np.ndarray, "4 4"]
Shape = tuple[int, int, int]

# Output voxels per band of an axis: wide enough for BLAS, narrow enough that few weights are zero.
_BAND = 32
# A voxel of a thin structure is drawn if its share is at least this part of the largest beside it.
# Measured on planes and lines of 1 to 2.6 voxels at random angles, shrunk 1.5 to 2 times: at 0.4
# planes keep 1.1 to 1.6 times their volume in one piece, lines of 2.6 voxels 1.1 to 1.3 times; with
# all touched voxels drawn (0) it is 1.4 to 2.3 times, at 0.6 lines fall apart.
_RIDGE = 0.4
# What a 12-bit scanner can tell apart.
_SCANNER_HU = (-1024, 3071)
# Voxels of the slab that is worked on; float32, two or three of them at a time.
_SLAB_VOXELS = 4_000_000


# ---------------------------------------------------------------------------- orientation


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Returns the voxel size (x, y, z) in mm of an affine."""
    x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def check_affine(affine: Affine) -> None:
    """Checks that an affine is a 4x4 matrix of finite numbers that can be inverted.

    Raises:
        UserError: it is not.
    """
    matrix = np.asarray(affine, np.float64)
    if matrix.shape != (4, 4):
        raise UserError(f"the affine has shape {matrix.shape}. Expected a 4x4 matrix")
    if not np.isfinite(matrix).all():
        raise UserError("the affine has values that are not finite. Mend the file's header")
    sizes = np.linalg.norm(matrix[:3, :3], axis=0)
    # The determinant of the directions: 1 for a right-angled grid, 0 for a singular one.
    if not (sizes > 0).all() or abs(np.linalg.det(matrix[:3, :3] / sizes)) < 1e-3:
        raise UserError(
            "the affine is singular: its three axes do not span the space. Mend the file's header"
        )


def axis_codes(affine: Affine) -> str:
    """Returns where an array's axes point, for instance "LPS".

    Raises:
        UserError: the affine is singular.
    """
    check_affine(affine)
    return "".join(orientations.aff2axcodes(affine))


def to_canonical(
    array: Shaped[np.ndarray, "i j k *channels"], affine: Affine
) -> tuple[Shaped[np.ndarray, "x y z *channels"], Affine]:
    """Turns a volume to RAS+ by flips and exchanges of axes, so no value changes.

    An oblique grid stays oblique: its axes are named by the direction that they are closest to.

    Args:
        array: the first three axes are space.
        affine: of the array.

    Returns:
        The volume [x, y, z], a view of the array given, and its affine.

    Raises:
        UserError: the affine is singular.
    """
    check_affine(affine)
    orientation = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(array, orientation)
    return turned, affine @ orientations.inv_ornt_aff(orientation, array.shape[:3])


def from_canonical(
    array: Shaped[np.ndarray, "x y z *channels"], original_affine: Affine
) -> Shaped[np.ndarray, "i j k *channels"]:
    """Undoes `to_canonical`.

    Args:
        array: a volume in RAS+ on the grid that `to_canonical` gave.
        original_affine: the affine that `to_canonical` was given.

    Returns:
        The volume with its axes as in the original file, a view of the array given.

    Raises:
        UserError: the affine is singular.
    """
    check_affine(original_affine)
    there = orientations.io_orientation(original_affine)
    back = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), there)
    return orientations.apply_orientation(array, back)


# ---------------------------------------------------------------------------- resampling


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> Shape:
    """Returns the shape at a new spacing: the physical extent divided by it, rounded, at least 1.

    Raises:
        UserError: a spacing is not positive.
    """
    old, new = np.asarray(spacing, np.float64), np.asarray(new_spacing, np.float64)
    if not ((old > 0) & (new > 0) & np.isfinite(old) & np.isfinite(new)).all():
        raise UserError(f"spacing {spacing} or {new_spacing}: expected positive millimetres")
    x, y, z = (max(1, int(n)) for n in np.floor(np.asarray(shape[:3]) * old / new + 0.5))
    return x, y, z


def resampled_spacing(
    shape: Sequence[int], spacing: Sequence[float], new_shape: Sequence[int]
) -> tuple[float, float, float]:
    """Returns the spacing in mm that the same physical extent has with another shape."""
    x, y, z = (float(s * n / m) for s, n, m in zip(spacing, shape, new_shape, strict=False))
    return x, y, z


def resampled_affine(affine: Affine, shape: Sequence[int], new_shape: Sequence[int]) -> Affine:
    """Returns the affine after resampling to another shape over the same physical extent."""
    ratio = np.asarray(shape[:3], np.float64) / np.asarray(new_shape[:3], np.float64)
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2
    return np.asarray(affine, np.float64) @ step


def resample(
    array: Num[np.ndarray, "x y z"],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    order: int = 3,
) -> Num[np.ndarray, "x2 y2 z2"]:
    """Resamples a volume to a new spacing over the same physical extent.

    Args:
        array: volume [x, y, z].
        spacing: its voxel size, mm.
        new_spacing: the voxel size wanted, mm; see `resampled_spacing` for the exact one.
        order: 0 for labels, 1 for linear, 3 for cubic; see `resample_to_shape`.

    Returns:
        float32 for orders 1 and 3, the array's own type for labels.

    Raises:
        UserError: a spacing is not positive, or the order is unknown.
    """
    return resample_to_shape(array, resampled_shape(array.shape, spacing, new_spacing), order)


def resample_to_shape(
    array: Num[np.ndarray, "x y z"], shape: Sequence[int], order: int = 3
) -> Num[np.ndarray, "x2 y2 z2"]:
    """Resamples a volume to another shape over the same physical extent.

    Order 1 is linear interpolation; along an axis that shrinks, the mean of the interpolant over
    each new voxel, so that ramps stay ramps and the volume's mean stays exactly. Order 3 is cubic
    convolution (Keys 1981, a = -1/2), its kernel widened by the ratio along an axis that shrinks,
    which averages what would alias; it keeps edges sharper and may overshoot at them. Order 0 is
    for labels, see `resample_labels`.

    Args:
        array: volume [x, y, z] of any number type.
        shape: the new shape.
        order: 0, 1 or 3.

    Returns:
        float32 for orders 1 and 3, the array's own type for labels. Axes lie in memory in the
        order of the array given.

    Raises:
        UserError: the order is unknown, the array is not 3D or is empty, or the shape is not
            positive.
    """
    if order == 0:
        return resample_labels(array, shape)
    if order not in _KERNELS:
        raise UserError(f"resampling order is {order!r}. Expected 0 (labels), 1 or 3")
    new = _check_shapes(array, shape)
    memory, back = _memory_order(array)
    new = tuple(new[axis] for axis in memory)
    source = array.transpose(memory)
    output = np.empty(new, np.float32)
    if source.shape == new:
        output[...] = source
        return output.transpose(back)
    weights = [_bands(n, m, order) for n, m in zip(source.shape, new, strict=True)]
    with _one_blas_thread():
        for low, high, slab in _slabs(source, weights, new):
            output[low:high] = slab
    return output.transpose(back)


def _overlap(distance: np.ndarray, width: float) -> np.ndarray:
    """How much of the voxel at a distance lies in a window of the width."""
    return np.clip((width + 1) / 2 - np.abs(distance), 0, 1)


def _linear(distance: np.ndarray, width: float) -> np.ndarray:
    """The linear interpolant's kernel, averaged over the new voxel where that is the larger."""
    if width <= 1:
        return np.maximum(1 - np.abs(distance), 0)

    def integral(x: np.ndarray) -> np.ndarray:
        x = np.clip(x, -1, 1)
        return np.where(x < 0, (1 + x) ** 2 / 2, 1 - (1 - x) ** 2 / 2)

    return integral(distance + width / 2) - integral(distance - width / 2)


def _cubic(distance: np.ndarray, width: float) -> np.ndarray:
    x = np.abs(distance / width)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# Order -> kernel(distance in old voxels, width in old voxels), and how far it reaches at a width.
_KERNELS: dict[int, tuple[Callable[[np.ndarray, float], np.ndarray], Callable[[float], float]]] = {
    0: (_overlap, lambda width: (width + 1) / 2),
    1: (_linear, lambda width: 1 + width / 2),
    3: (_cubic, lambda width: 2 * width),
}

# One band: its rows (new voxels) and columns (old voxels) of the axis' matrix, and the weights.
_Band = tuple[slice, slice, np.ndarray]


def axis_matrix(old: int, new: int, order: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights with which the voxels of an old axis make those of a new one.

    Args:
        old: voxels before.
        new: voxels after, over the same length.
        order: 0 for the shares of the labels (linear where the axis grows, overlap of the voxels
            where it shrinks; the two agree where it stays), 1 for linear, 3 for cubic.

    Returns:
        float32 matrix; each row sums to 1.
    """
    if old == new:
        return np.eye(old, dtype=np.float32)
    ratio = old / new
    width = max(1.0, ratio)
    centre = (np.arange(new) + 0.5) * ratio - 0.5
    kernel, half_width = _KERNELS[order]
    half = half_width(width)
    first = np.floor(centre - half).astype(int)
    columns = first[:, None] + np.arange(int(2 * half) + 2)
    distance = columns - centre[:, None]
    weights = kernel(distance, width)
    weights /= weights.sum(axis=1, keepdims=True)
    # Reflection about the outer faces.
    period = columns % (2 * old)
    columns = np.where(period < old, period, 2 * old - 1 - period)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], columns), weights)
    return matrix.astype(np.float32)


def _bands(old: int, new: int, order: int) -> list[_Band] | None:
    """Returns an axis' matrix in bands of rows; None for an axis that stays."""
    return None if old == new else _cut(axis_matrix(old, new, order))


def _cut(matrix: Float[np.ndarray, "new old"]) -> list[_Band]:
    bands = []
    for start in range(0, len(matrix), _BAND):
        rows = matrix[start : start + _BAND]
        used = np.flatnonzero(rows.any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        part = np.ascontiguousarray(rows[:, low:high])
        bands.append((slice(start, start + len(rows)), slice(low, high), part))
    return bands


def _one_blas_thread() -> threadpool_limits:
    """Keeps BLAS to one thread: these products are small, and threads that wait for each other cost
    30 times as much processor time on a busy machine."""
    return threadpool_limits(limits=1, user_api="blas")


def _apply(
    array: Float[np.ndarray, "a b c"], bands: list[_Band] | None, axis: int
) -> Float[np.ndarray, "a2 b2 c2"]:
    """Multiplies one axis of a float32 volume by its matrix."""
    if bands is None:
        return array
    a, b, c = array.shape
    new = bands[-1][0].stop
    if axis == 0:
        output = np.empty((new, b, c), np.float32)
        for rows, columns, part in bands:
            np.matmul(part, array[columns].reshape(-1, b * c), out=output[rows].reshape(-1, b * c))
    elif axis == 1:
        output = np.empty((a, new, c), np.float32)
        for rows, columns, part in bands:
            np.matmul(part, array[:, columns], out=output[:, rows])
    else:
        output = np.empty((a, b, new), np.float32)
        for rows, columns, part in bands:
            np.matmul(
                array.reshape(a * b, c)[:, columns],
                part.T,
                out=output.reshape(a * b, new)[:, rows],
            )
    return output


def _slabs(
    source: Num[np.ndarray, "a b c"], weights: list[list[_Band] | None], new: Sequence[int]
) -> Iterator[tuple[int, int, Float[np.ndarray, "rows b2 c2"]]]:
    """Yields the new volume in slabs of its first axis: (first row, last row + 1, slab).

    Each old slice is resampled within its plane once, and kept while later slabs need it.
    """
    # The axis that shrinks most goes first: less is left for the other.
    plane = sorted((1, 2), key=lambda axis: new[axis] / source.shape[axis])

    def in_plane(low: int, high: int) -> np.ndarray:
        step = max(1, _SLAB_VOXELS // (source.shape[1] * source.shape[2]))
        parts = []
        for start in range(low, high, step):
            part = source[start : min(start + step, high)].astype(np.float32, order="C")
            for axis in plane:
                part = _apply(part, weights[axis], axis)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    first = weights[0]
    if first is None:
        step = max(1, _SLAB_VOXELS // max(source[0].size, new[1] * new[2]))
        for low in range(0, new[0], step):
            yield low, min(low + step, new[0]), in_plane(low, min(low + step, new[0]))
        return
    kept, kept_low = np.empty((0, new[1], new[2]), np.float32), 0
    for rows, columns, part in first:
        low = min(max(columns.start, kept_low), kept_low + len(kept))
        kept = kept[low - kept_low :]
        start = max(columns.start, low + len(kept))
        if len(kept) == 0:
            start = columns.start
        fresh = in_plane(start, columns.stop) if start < columns.stop else kept[:0]
        kept = np.concatenate([kept, fresh]) if len(kept) else fresh
        kept_low = columns.start
        flat = kept[: columns.stop - columns.start].reshape(columns.stop - columns.start, -1)
        yield rows.start, rows.stop, (part @ flat).reshape(-1, new[1], new[2])


def _check_shapes(array: np.ndarray, shape: Sequence[int]) -> tuple[int, ...]:
    new = tuple(int(n) for n in shape)
    if array.ndim != 3 or not array.size:
        raise UserError(f"a volume of shape {array.shape} cannot be resampled. Expected [x, y, z]")
    if len(new) != 3 or min(new) < 1:
        raise UserError(f"new shape is {tuple(shape)}. Expected three positive numbers")
    return new


def _memory_order(array: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes from slowest to fastest in memory, and the order that undoes it."""
    memory = tuple(
        int(axis) for axis in np.argsort([-abs(s) for s in array.strides], kind="stable")
    )
    return memory, tuple(int(axis) for axis in np.argsort(memory))


def prepare_image(
    image: Num[np.ndarray, "x y z"],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    window: Sequence[float],
    order: int = 3,
) -> Float[np.ndarray, "x2 y2 z2"]:
    """Makes a scan what networks are trained on: resampled, clipped to a window, scaled to [0, 1].

    Before resampling, HU are limited to those of a 12-bit scanner, -1024 to 3071: the padding and
    the metal beyond (-32768, 30000) would ring into the tissue beside them.

    Args:
        image: HU [x, y, z].
        spacing: its voxel size, mm.
        new_spacing: the one wanted, mm; see `resample`.
        window: HU that become 0 and 1.
        order: 1 for linear, 3 for cubic.

    Returns:
        float32 in [0, 1].

    Raises:
        UserError: a spacing is not positive, or the order is unknown.
    """
    if image.min() < _SCANNER_HU[0] or image.max() > _SCANNER_HU[1]:
        image = np.clip(image, *_SCANNER_HU)
    low, high = float(window[0]), float(window[1])
    resampled = resample(image, spacing, new_spacing, order)
    np.clip(resampled, low, high, out=resampled)
    resampled -= np.float32(low)
    resampled *= np.float32(1 / (high - low))
    # Rounding may end a hair above 1.
    return np.minimum(resampled, 1, out=resampled)


# ---------------------------------------------------------------------------- labels


def resample_labels(
    labels: Num[np.ndarray, "x y z"], shape: Sequence[int]
) -> Num[np.ndarray, "x2 y2 z2"]:
    """Resamples labels class by class, without losing what is thin.

    Each class becomes the share of the new voxel that it covers (see `axis_matrix`, order 0), and
    the largest share wins. That loses structures which are thinner than a voxel, vessels and walls
    foremost, since they rarely have the largest share anywhere. Parts of a class that are too thin
    to be sure to win (what opening the class with a box of the new voxel's size removes, beyond
    the rounded-off rim of its thick parts) are therefore drawn on top, along the voxels in which
    they have the largest share of their surroundings. So they stay, connected or nearly so, about
    one new voxel thick; of two thin classes the one with the larger share is drawn.

    Args:
        labels: volume [x, y, z] of integers or booleans; 0 is background.
        shape: the new shape.

    Returns:
        Volume of the same type. No value that was not there before.

    Raises:
        UserError: the array is not 3D or is empty, or the shape is not positive.
    """
    new = _check_shapes(labels, shape)
    memory, back = _memory_order(labels)
    new = tuple(new[axis] for axis in memory)
    source = labels.transpose(memory)
    if source.shape == new:
        return source.copy().transpose(back)
    with _one_blas_thread():
        return _resample_classes(source, new).transpose(back)


def _resample_classes(
    source: Num[np.ndarray, "a b c"], new: tuple[int, ...]
) -> Num[np.ndarray, "a2 b2 c2"]:
    output = np.zeros(new, source.dtype)
    ratios = [n / m for n, m in zip(source.shape, new, strict=True)]
    matrices = [axis_matrix(n, m, 0) for n, m in zip(source.shape, new, strict=True)]
    contains = [_containing(n, m) for n, m in zip(source.shape, new, strict=True)]
    # Share of the best class so far, and of all foreground, in 1/255: a byte is as good here as a
    # float and a quarter of the memory.
    best = np.zeros(new, np.uint8)
    total = np.zeros(new, np.uint8)
    thin_parts = []
    for value, box in label_boxes(source).items():
        mask = source[box] == value
        where, share = _share(mask, box, matrices)
        share = np.floor(share * 255 + 0.5).astype(np.uint8)
        total[where] = np.minimum(total[where], 255 - share) + share
        better = share > best[where]
        output[where][better] = value
        best[where][better] = share[better]
        thin = _thin(mask, ratios)
        if thin.any():
            corner, drawn = _share(thin, box, contains)
            voxels = np.argwhere(drawn > 0) + [side.start for side in corner]
            strength, ridge = _strengths(voxels, where, share)
            thin_parts.append((value, voxels[ridge], strength[ridge]))
    # Background is the rest; between equals the foreground wins.
    output[best < 255 - total] = 0
    best[...] = 0
    for value, voxels, strength in thin_parts:
        better = strength > best[tuple(voxels.T)]
        at = tuple(voxels[better].T)
        output[at], best[at] = value, strength[better]
    return output


def _strengths(
    voxels: Int[np.ndarray, "n 3"],
    where: tuple[slice, ...],
    share: UInt8[np.ndarray, "a b c"],
) -> tuple[UInt8[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns a class' share of each voxel, at least 1, and whether that is near the largest about.

    A thin structure that lies across two voxels has a small share of both. Where one of its
    neighbours has a much larger one, a voxel is left out: drawn as well it would make the structure
    thicker and not better connected.
    """
    low = np.array([side.start for side in where])
    high = np.array([side.stop for side in where]) - 1
    inside = ((voxels >= low) & (voxels <= high)).all(axis=1)
    at = tuple((np.clip(voxels, low, high) - low).T)
    strength = np.maximum(np.where(inside, share[at], 0), 1).astype(np.uint8)
    largest = share
    for axis in range(3):
        for sign in (1, -1):
            largest = _shifted(largest, axis, 2, np.maximum, sign)
    largest = largest[at]
    return strength, strength >= _RIDGE * np.where(inside, largest, 0)


def label_boxes(labels: Num[np.ndarray, "x y z"]) -> dict[int, tuple[slice, ...]]:
    """Returns label -> bounding box of its voxels, for the labels that are there, 0 left out."""
    if labels.dtype.kind in "iu" and labels.itemsize <= 2 and labels.min() >= 0:
        # One pass for all labels.
        boxes = ndimage.find_objects(labels)
        return {value: box for value, box in enumerate(boxes, start=1) if box is not None}
    return {value: _box(labels == value) for value in np.unique(labels).tolist() if value}


def _containing(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns 1 where a new voxel holds an old one's centre, or has its own centre in it."""
    matrix = np.zeros((new, old), np.float32)
    matrix[((np.arange(old) + 0.5) * new / old).astype(int), np.arange(old)] = 1
    matrix[np.arange(new), ((np.arange(new) + 0.5) * old / new).astype(int)] = 1
    return matrix


def _box(mask: Bool[np.ndarray, "a b c"]) -> tuple[slice, ...]:
    """Returns the bounding box of what is true; something has to be."""
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _share(
    mask: Bool[np.ndarray, "a b c"],
    box: tuple[slice, ...],
    matrices: list[Float[np.ndarray, "new old"]],
) -> tuple[tuple[slice, ...], Float[np.ndarray, "a2 b2 c2"]]:
    """Returns where in the new volume a mask that lies in a box has weight, and how much."""
    where, parts = [], []
    for matrix, side in zip(matrices, box, strict=True):
        part = matrix[:, side]
        used = np.flatnonzero(part.any(axis=1))
        where.append(slice(int(used[0]), int(used[-1]) + 1))
        parts.append(part[where[-1]])
    bands = [_cut(part) for part in parts]
    shape = [len(part) for part in parts]
    share = np.empty(shape, np.float32)
    for low, high, slab in _slabs(mask, list(bands), shape):
        share[low:high] = slab
    return tuple(where), share


def _thin(mask: Bool[np.ndarray, "a b c"], ratios: Sequence[float]) -> Bool[np.ndarray, "a b c"]:
    """Returns the parts of a mask that are too thin to be sure to win a new voxel.

    A run of ceil(ratio) + 1 old voxels covers one new voxel to 3/4 or more wherever it lies, two
    such runs at right angles still to more than half.
    """
    lengths = [int(np.ceil(ratio - 1e-6)) + 1 for ratio in ratios]
    pads = [(length, length) for length in lengths]
    inside = np.pad(mask, pads)
    opened = inside
    for axis, length in enumerate(lengths):
        opened = _shifted(opened, axis, length, np.logical_and, 1)
    # Widened by one voxel more on each side than opening asks for: the rim that opening rounds off
    # thick parts is not thin.
    for axis, length in enumerate(lengths):
        opened = _shifted(opened, axis, length, np.logical_or, -1)
    rim = opened
    for axis in range(3):
        rim = _shifted(_shifted(rim, axis, 2, np.logical_or, 1), axis, 2, np.logical_or, -1)
    inside &= ~rim
    return inside[tuple(slice(length, -length) for length in lengths)]


def _shifted(
    array: Shaped[np.ndarray, "a b c"], axis: int, length: int, merge: np.ufunc, sign: int
) -> Shaped[np.ndarray, "a b c"]:
    """Merges each voxel with the next (sign 1) or previous (-1) length - 1 ones along an axis."""
    output = array.copy()
    ahead, behind = [slice(None)] * 3, [slice(None)] * 3
    for step in range(1, length):
        ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
        low, high = (behind, ahead) if sign > 0 else (ahead, behind)
        target = output[tuple(low)]
        merge(target, array[tuple(high)], out=target)
    return output
