"""3D convolution in the formulation that is fast on the backend at hand.

On TPU and GPU a convolution is `lax.conv_general_dilated`. XLA's CPU backend has a fast 2D
convolution and a slow 3D one, and the gradient of a strided 3D convolution with respect to its
input is slower still. There a 3D convolution is one 2D convolution over (y, z): its channels
are the x taps side by side, and its batch holds the x positions.

With stride 1 three x taps are computed Winograd's way (winograd.py).

Milliseconds on 2 cores (AVX-512), float32, two crops, forward / gradient of input / of weights:

| input, channels, stride | lax.conv 3D | one 2D convolution | Winograd's |
| --- | --- | --- | --- |
| 32^3, 8 to 8, 1 | 28 / 30 / 45 | 5.5 / 4.0 / 7.5 | 3.9 / 4.2 / 3.6 |
| 48^3, 64 to 64, 1 | 943 / 847 / 1339 | 518 / 334 / 534 | 244 / 233 / 307 |
| 12^3, 256 to 256, 1 | 92 / 94 / 140 | 69 / 80 / 67 | 33 / 41 / 39 |
| 48^3, 64 to 128, 2 | 166 / 6145 / 581 | 180 / 129 / 205 | |

`python -m benchmarks.convolution` measures them. The backward rule keeps only the input: the taps
side by side would hold three times the memory of the activations between the passes.

Where devices split x between them, each convolves its own planes with `lax.conv_general_dilated`,
on every backend, after its neighbours have sent it theirs at the border: see `split_along_x`. XLA
would find that out by itself from the whole convolution, but not at levels where a device has few
planes (TPU: it gathers them), nor from the formulations that mix x with the batch.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from tumorjax import backend
from tumorjax.models import winograd

_DIMENSIONS_3D = ("NXYZC", "XYZIO", "NXYZC")
_DIMENSIONS_2D = ("NHWC", "HWIO", "NHWC")
FORMULATIONS = ("auto", "direct", "planar", "winograd")
# Below so many weights a tap Winograd's transforms cost more than the multiplications it saves.
_WINOGRAD_WEIGHTS = 64
# XLA gives a 2D convolution on CPU to YNNPACK, which computes those of less than 128 channels on
# one core (jax 0.10: 50 to 100 GFLOP/s where Eigen's reach 170 on two cores), or else to Eigen.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}

_mesh_with_x_split: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "mesh whose devices share x", default=None
)


@contextlib.contextmanager
def split_along_x(mesh: Mesh | None) -> Iterator[None]:
    """Convolutions that are traced within exchange borders where the mesh's "space" splits x.

    A function that jax.jit has traced before is not traced again: wrap the body of what is jitted
    for one mesh, not its call.

    Args:
        mesh: over whose "space" the first axis of features is split. None, or where "space" is one
            device: nothing changes.
    """
    split = mesh is not None and mesh.shape["space"] > 1
    token = _mesh_with_x_split.set(mesh if split else None)
    try:
        yield
    finally:
        _mesh_with_x_split.reset(token)


def convolution(
    x: Float[Array, "b x y z c"],
    kernel: Float[Array, "i j k c d"],
    stride: tuple[int, int, int] = (1, 1, 1),
    formulation: str = "auto",
) -> Float[Array, "b x2 y2 z2 d"]:
    """Convolves with padding kernel // 2, as PyTorch's Conv3d(padding=kernel // 2) does.

    Args:
        x: the input.
        kernel: weights with an odd size along each axis.
        stride: step along each axis. An axis of n voxels becomes ceil(n / step) voxels.
        formulation: "direct" (lax), "planar" (one 2D convolution), "winograd" (planar where the
            kernel or the stride is not Winograd's) or "auto": direct but on CPU, there the
            faster of the other two unless devices share x.
    """
    mesh = _mesh_with_x_split.get()
    if formulation == "auto" and mesh is not None:
        return _convolve_split(x, kernel, stride, mesh)
    if formulation == "auto":
        formulation = choose(kernel.shape[3] * kernel.shape[4])
    if formulation == "direct":
        return _direct(x, kernel, stride)
    if kernel.shape[:3] == (1, 1, 1):
        return _pointwise(x, kernel, stride)
    if formulation == "winograd" and kernel.shape[0] == 3 and tuple(stride) == (1, 1, 1):
        return winograd.convolve(x, kernel)
    return _planar_with_backward(x, kernel, stride)


def choose(weights: int) -> str:
    """Returns the formulation for a kernel of so many weights a tap on the backend at hand."""
    if backend.platform() != "cpu":
        return "direct"
    return "winograd" if weights >= _WINOGRAD_WEIGHTS else "planar"


def compiler_options() -> dict[str, str]:
    """Returns what jax.jit takes as compiler_options wherever a network is compiled.

    On CPU convolutions then use all cores; other backends, and versions of XLA that do not know the
    option, get none.
    """
    return dict(_CPU_OPTIONS) if backend.platform() == "cpu" and _options_are_known() else {}


@functools.cache
def _options_are_known() -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except (ValueError, jax.errors.JaxRuntimeError):
        return False
    return True


def convolution_of_parts(
    parts: Sequence[Float[Array, "b x y z _c"]],
    kernel: Float[Array, "i j k c d"],
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Float[Array, "b x2 y2 z2 d"]:
    """Convolves arrays as if their channels stood side by side.

    On CPU it is the sum of their convolutions: nothing is copied, and a U-Net keeps no second copy
    of its skip connections for the backward pass.
    """
    if len(parts) == 1 or backend.platform() != "cpu":
        return convolution(jnp.concatenate(parts, axis=-1), kernel, stride)
    ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
    kernels = jnp.split(kernel, ends, axis=3)
    convolved = [convolution(p, k, stride) for p, k in zip(parts, kernels, strict=True)]
    return sum(convolved[1:], start=convolved[0])


def transposed_convolution(
    x: Float[Array, "b x y z c"], kernel: Float[Array, "i j k c d"]
) -> Float[Array, "b x*i y*j z*k d"]:
    """Transposed convolution whose stride is its kernel size, as U-Nets use it to grow.

    Outputs do not overlap, so it is a matrix product and a rearrangement on every backend.
    """
    b, nx, ny, nz, _ = x.shape
    i, j, k, _, d = kernel.shape
    y = jnp.einsum("bxyzc,ijkcd->bxiyjzkd", x, kernel)
    return y.reshape(b, nx * i, ny * j, nz * k, d)


def _direct(x, kernel, stride):
    padding = [(n // 2, n // 2) for n in kernel.shape[:3]]
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=_DIMENSIONS_3D)


def _convolve_split(x, kernel, stride, mesh: Mesh):
    """Convolves where the devices of "space" have equal shares of x: each its own planes."""
    devices = mesh.shape["space"]
    if x.shape[1] % (devices * stride[0]):
        # A level that does not divide has no planes of its own on each device.
        return _direct(x, kernel, stride)
    before = kernel.shape[0] // 2
    after = max(before - stride[0] + 1, 0)
    padding = [(0, 0), *((n // 2, n // 2) for n in kernel.shape[1:3])]

    def convolve(x, kernel):
        x = _with_borders(x, before, after, devices)
        return lax.conv_general_dilated(
            x, kernel, stride, padding, dimension_numbers=_DIMENSIONS_3D
        )

    planes = PartitionSpec(None, "space")
    # Where cells are mapped over devices already, the mesh of the context says so.
    context = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        convolve,
        mesh=mesh if context.empty else None,
        in_specs=(planes, PartitionSpec()),
        out_specs=planes,
        axis_names={"space"},
        check_vma=False,
    )(x, kernel)


def _with_borders(x, before: int, after: int, devices: int):
    """Returns a device's planes with some of its neighbours' on both sides; zeros at the ends."""
    planes = x.shape[1]

    def from_side(count: int, step: int) -> list[Array]:
        parts = []
        # Neighbours of neighbours, where one has fewer planes than the kernel reaches.
        for hop in range(1, -(-count // planes) + 1):
            wanted = min(count - (hop - 1) * planes, planes)
            part = x[:, planes - wanted :] if step > 0 else x[:, :wanted]
            pairs = [(i, i + step * hop) for i in range(devices)]
            pairs = [(i, to) for i, to in pairs if 0 <= to < devices]
            # Who is sent nothing gets zeros: the convolution's padding.
            parts.append(lax.ppermute(part, "space", pairs) if pairs else jnp.zeros_like(part))
        return parts

    left, right = from_side(before, 1), from_side(after, -1)
    return jnp.concatenate([*left[::-1], x, *right], axis=1) if left or right else x


def _pointwise(x, kernel, stride):
    x = x[:, :: stride[0], :: stride[1], :: stride[2]]
    return jnp.matmul(x, kernel[0, 0, 0])


def _taps(x, size: int, step: int):
    """Lays the x taps of each output position side by side in the channels."""
    count = -(-x.shape[1] // step)
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0), (0, 0)))
    taps = [x[:, i : i + (count - 1) * step + 1 : step] for i in range(size)]
    return jnp.concatenate(taps, axis=-1)


def _planar(x, kernel, stride, *, padded=False):
    """Convolves; `padded` says that x has its border along y and z already."""
    taps = _taps(x, kernel.shape[0], stride[0])
    b, nx, ny, nz, c = taps.shape
    # [i, j, k, c, d] -> [j, k, i * c, d]: the channel order of the taps.
    planar_kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], c, kernel.shape[-1])
    y = lax.conv_general_dilated(
        taps.reshape(b * nx, ny, nz, c),
        planar_kernel,
        stride[1:],
        "VALID" if padded else [(n // 2, n // 2) for n in kernel.shape[1:3]],
        dimension_numbers=_DIMENSIONS_2D,
    )
    return y.reshape(b, nx, *y.shape[1:])


def _planar_by_blocks(x, kernel, stride):
    """The same result with (y, z) gathered in 2x2 blocks, so that nothing is strided.

    Only its gradient with respect to x is used: it is the faster one where the stride is 2.
    """
    taps = _taps(x, kernel.shape[0], stride[0])
    b, nx, ny, nz, c = taps.shape
    blocks = taps.reshape(b * nx, ny // 2, 2, nz // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    planar_kernel = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, c, kernel.shape[-1])
    # Taps -1..1 about even positions, seen from blocks -1 (taps -2, -1) and 0 (taps 0, 1).
    block_kernel = jnp.pad(planar_kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    block_kernel = block_kernel.reshape(2, 2, 2, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
    y = lax.conv_general_dilated(
        blocks.reshape(b * nx, ny // 2, nz // 2, 4 * c),
        block_kernel.reshape(2, 2, 4 * c, -1),
        (1, 1),
        [(1, 0), (1, 0)],
        dimension_numbers=_DIMENSIONS_2D,
    )
    return y.reshape(b, nx, ny // 2, nz // 2, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _planar_with_backward(x, kernel, stride):
    return _planar(x, kernel, stride)


def _forward(x, kernel, stride):
    return _planar(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
    x, kernel = residuals
    blocks_fit = (
        stride[1:] == (2, 2)
        and kernel.shape[1:3] == (3, 3)
        and x.shape[2] % 2 == 0
        and x.shape[3] % 2 == 0
    )
    of_x = _planar_by_blocks if blocks_fit else _planar
    (gradient_x,) = jax.vjp(lambda x: of_x(x, kernel, stride), x)[1](gradient)
    # Of images with a border about them: see winograd.py.
    border = jnp.pad(x, ((0, 0), (0, 0), *((n // 2, n // 2) for n in kernel.shape[1:3]), (0, 0)))
    of_kernel = functools.partial(_planar, border, stride=stride, padded=True)
    (gradient_kernel,) = jax.vjp(of_kernel, kernel)[1](gradient)
    return gradient_x, gradient_kernel


_planar_with_backward.defvjp(_forward, _backward)
