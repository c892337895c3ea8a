"""Synthetic tumours made on the device, inside a training step.

Crops of healthy scans get a tumour each before they are augmented: a shape, a place in the part of
the organ that the crop shows, and a look by one of two synthesizers. No two steps see the same one,
and nothing is kept on disk. `make` returns the function that does it, jitted and batched, for
`training.segmenter`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from tumorjax import anatomy, backend, parallel
from tumorjax.errors import UserError
from tumorjax.synthesis import diffusion_render, online_texture, shapes, texture
from tumorjax.synthesis.trained_diffusion import TrainedDiffusion
from tumorjax.training.segmenter import Transform

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]

SETTINGS = ("synthesizer", "prior", "sizes", "texture", "spacing", "window")
# Places that are tried, each with the radius drawn times one of these.
_TRIES = (1.0, 1.0, 0.7, 0.5)
# As in `placement`: what the organ leaves of a tumour, how much of the organ it may take, and how
# far from other tumours it stays.
_KEPT_RADIUS = 0.75
_MOST_OF_ORGAN = 0.6
_GAP_MM = 3.0
# An organ of fewer voxels in the crop is too little of it.
_LEAST_ORGAN = 30
# Crops that "rules" draws into, mm, and the seam of "diffusion", as diffusion_render has it.
_EXTENT_MM = 128.0
_EDGE_MM = (0.5, 1.5)
_NOISE_VOXELS = 1.5


class Host(NamedTuple):
    """Where a kind of tumour goes.

    Attributes:
        organ: organ group.
        classes: the task's class indices that are the organ.
        tumor: the tumour's class index.
    """

    organ: str
    classes: tuple[int, ...]
    tumor: int


class Placed(NamedTuple):
    """Tumours that were given a place; one row a crop of the batch.

    Attributes:
        corner: of the part of the crop that they are drawn in, voxels.
        mask: in that part.
        level: their level sets there.
        organ: the host there.
        host: number among the hosts.
        radius_mm: of the ball of the mask's volume.
        found: whether there was a place.
    """

    corner: Int[Array, "b 3"]
    mask: Bool[Array, "b x y z"]
    level: Float[Array, "b x y z"]
    organ: Bool[Array, "b x y z"]
    host: Int[Array, " b"]
    radius_mm: Float[Array, " b"]
    found: Bool[Array, " b"]


def find_hosts(classes: Mapping[str, Sequence[str]]) -> list[Host]:
    """Returns the tumours of a task whose organ is a class of its own, in the order of `HOST`.

    Args:
        classes: of the task: class name -> labels that it unites.
    """
    table = anatomy.class_table(classes)
    united = [set(labels) for labels in classes.values()]
    hosts = []
    for tumor, organ in anatomy.HOST.items():
        own = {*anatomy.organ_labels(organ), *anatomy.INSIDE.get(organ, ())}
        indices = tuple(i for i, labels in enumerate(united, start=1) if labels and labels <= own)
        if table[anatomy.LABELS[tumor]] and indices:
            hosts.append(Host(organ, indices, int(table[anatomy.LABELS[tumor]])))
    return hosts


def from_settings(
    settings: Mapping[str, Any],
    classes: Mapping[str, Sequence[str]],
    preparation: Mapping[str, Any],
    mesh: Mesh | None = None,
) -> Transform:
    """Returns the transform of a configuration; equal ones are one function, compiled once.

    Args:
        settings: `synthesizer` ("rules" or "diffusion"), `prior`, `sizes` ({size: weight}),
            `texture` (organ -> changes, of "rules"); `checkpoint`, `sampler`, `steps` and
            `guidance` of "diffusion". Others are not looked at.
        classes: of the task.
        preparation: `spacing` and `window` of the scans.
        mesh: of the training; None for one device.

    Raises:
        UserError: see `make` and `diffusion_render.open_model`.
    """
    names = (*SETTINGS[:4], "checkpoint", "sampler", "steps", "guidance")
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    chosen |= {name: list(preparation[name]) for name in ("spacing", "window")}
    # Class indices rest on the order of the classes.
    text = json.dumps([chosen, [[name, list(labels)] for name, labels in classes.items()]])
    return _from_text(text, mesh)


@backend.cached(8)
def _from_text(text: str, mesh: Mesh | None) -> Transform:
    chosen, classes = json.loads(text)
    trained = None
    if chosen.get("synthesizer") == "diffusion":
        sampling = [chosen.get(name) for name in ("sampler", "steps", "guidance")]
        trained = diffusion_render.open_model(chosen.get("checkpoint", ""), *sampling).trained
    settings = {name: chosen[name] for name in SETTINGS if name in chosen}
    return make(trained, dict(classes), settings, mesh)


def make(
    trained: TrainedDiffusion | None,
    classes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    mesh: Mesh | None = None,
) -> Transform:
    """Returns what puts tumours into the crops of a batch.

    It is called as (key, image [b, x, y, z, 1] in the store's [0, 1], label uint8 class indices
    [b, x, y, z], where bool [b]) -> (image, label). Each row where `where` holds gets one tumour,
    of one of the kinds whose organ the crop shows, with a radius of the prior. Four places are
    tried, the last two with 0.7 and 0.5 of the radius. A tumour is cut to its organ; it needs 0.75
    of its radius after that and at most 60 % of the organ that is there. Rows without a place stay
    as they are, bit for bit, and so does everything beyond a tumour's soft edge.

    It is jitted, and its `apply` works within other jitted functions. Rows are independent of one
    another, and of how they lie on the devices.

    Args:
        trained: the model of "diffusion"; None for "rules".
        classes: of the task: class name -> labels that it unites, in the order of their indices.
        settings: `spacing` (mm) and `window` (HU) of the crops; `synthesizer` (default "rules"),
            `prior` (default "difftumor"), `sizes` (a mix as of `shapes.sample_radius`, default the
            prior's own), and for "rules" `texture` (organ -> changes of its texture).
        mesh: of the training; rows then stay on the devices that they lie on, whole along x.

    Raises:
        UserError: no tumour of the task has its organ among the classes; the model knows none of
            the organs, or another spacing or window; a setting is unknown.
    """
    name = settings.get("synthesizer", "rules")
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown or name not in ("rules", "diffusion"):
        raise UserError(
            f"online synthesis: {', '.join(unknown) or f'synthesizer {name!r}'} is unknown."
            f" Expected {', '.join(SETTINGS)}, and synthesizer rules or diffusion"
        )
    hosts = find_hosts(classes)
    if not hosts:
        raise UserError(
            "online synthesis needs a tumour and its organ as classes of their own, and"
            f" task.classes has {', '.join(classes)}. Add the organ, as liver beside liver_lesion"
        )
    x, y, z = (float(value) for value in settings["spacing"])
    spacing = (x, y, z)
    low, high = (float(value) for value in settings["window"])
    if name == "diffusion":
        if trained is None:
            raise UserError("online synthesis by 'diffusion' needs a trained model")
        hosts = _known_hosts(trained, hosts, spacing, (low, high))
        # Whole on every device, and an argument of what is compiled, not a part of it.
        weights: Any = trained.generate
        if mesh is not None:
            weights = parallel.replicate(mesh, weights)
        draw = functools.partial(
            _draw_diffusion, [trained.organs.index(host.organ) for host in hosts]
        )
    else:
        weights = ()
        draw = functools.partial(_draw_rules, _looks(hosts, settings.get("texture") or {}))
    radii, forms = _stack_priors(hosts, settings.get("prior", "difftumor"), settings.get("sizes"))

    def add_tumors(weights, key, image, label, where):
        if mesh is not None:
            rows = parallel.sample_sharding(mesh)
            image, label = (jax.lax.with_sharding_constraint(a, rows) for a in (image, label))
        crop = _crop_of(image.shape[1:4], trained, spacing)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(image.shape[0]))
        # Patches that are smaller than the crop are continued by their outermost voxels.
        patch = image.shape[1:4]
        pads = [(0, 0), *((0, max(0, c - n)) for c, n in zip(crop, patch, strict=True))]
        values = jnp.pad(image[..., 0], pads, mode="edge")
        labels = jnp.pad(label, pads)
        place = functools.partial(_place, hosts, radii, forms, crop, patch, spacing)
        placed = jax.vmap(place)(keys, labels, where)

        def drawn():
            cut = jax.vmap(functools.partial(jax.lax.dynamic_slice, slice_sizes=crop))
            part, names = cut(values, placed.corner), cut(labels, placed.corner)
            hu = part * (high - low) + low
            lesion, edge_mm = draw(weights, keys, hu, placed, spacing, (low, high))
            weigh = functools.partial(online_texture.edge_weight, spacing=spacing)
            weight = jax.vmap(weigh)(placed.mask, placed.organ, edge_mm)
            mixed = jnp.clip((hu + weight * (lesion - hu) - low) / (high - low), 0, 1)
            found = placed.found[:, None, None, None]
            part = jnp.where(found & (weight > 0), mixed, part)
            kinds = jnp.asarray([host.tumor for host in hosts], label.dtype)[placed.host]
            names = jnp.where(found & placed.mask, kinds[:, None, None, None], names)
            paste = jax.vmap(jax.lax.dynamic_update_slice)
            return paste(values, part, placed.corner), paste(labels, names, placed.corner)

        # Most batches of a study have healthy scans; those without cost next to nothing.
        values, labels = jax.lax.cond(jnp.any(placed.found), drawn, lambda: (values, labels))
        inside = tuple(slice(n) for n in patch)
        return values[:, *inside, None], labels[:, *inside]

    # Without compiler options, which only the step that it becomes part of may have.
    return Transform(jax.jit(add_tumors), weights)


# ---------------------------------------------------------------------------- what is set once


def _known_hosts(trained, hosts, spacing, window) -> list[Host]:
    """Returns the hosts that a model knows, and checks its grid."""
    for name, found, wanted in (
        ("spacing", spacing, trained.spacing),
        ("window", window, trained.window),
    ):
        if tuple(map(float, wanted)) != tuple(found):
            raise UserError(
                f"the crops have {name} {found}, and the diffusion model was trained with"
                f" {tuple(wanted)}. Train one on scans of this {name}"
            )
    known = [host for host in hosts if host.organ in trained.organs]
    if not known:
        raise UserError(
            f"the diffusion model was trained on tumours of {', '.join(trained.organs)}, and the"
            f" task has those of {', '.join(host.organ for host in hosts)}. Train one on these"
        )
    return known


def _looks(hosts: Sequence[Host], changes: Mapping[str, Any]) -> list[texture.Texture]:
    looks = []
    for host in hosts:
        own = dict(changes.get(host.organ) or {})
        if unknown := sorted(set(own) - set(texture.Texture._fields)):
            raise UserError(
                f"texture settings {', '.join(unknown)} are unknown. Expected some of"
                f" {', '.join(texture.Texture._fields)}"
            )
        if own.get("mass_effect"):
            raise UserError("online synthesis has no mass effect. Leave it out of texture")
        looks.append(texture.TEXTURES[host.organ]._replace(**own))
    return looks


def _stack_priors(hosts, prior, sizes):
    """Returns radii and shapes of the hosts as numbers, the first axis the host."""
    radii = [shapes.radius_prior(host.organ, prior, sizes) for host in hosts]
    forms = [shapes.shape_prior(host.organ, prior) for host in hosts]
    return [jax.tree.map(lambda *n: jnp.stack(n), *numbers) for numbers in (radii, forms)]


def _crop_of(patch, trained, spacing) -> Shape:
    if trained is not None:
        x, y, z = (int(n) for n in trained.crop)
    else:
        x, y, z = (min(int(n), round(_EXTENT_MM / s)) for n, s in zip(patch, spacing, strict=True))
    return x, y, z


# ---------------------------------------------------------------------------- places


def _place(
    hosts: Sequence[Host],
    radii: shapes.RadiusPrior,
    forms: Any,
    crop: Shape,
    patch: Shape,
    spacing: Triple,
    key: PRNGKeyArray,
    label: UInt8[Array, "x y z"],
    where: Bool[Array, ""],
) -> Placed:
    """Draws one tumour's kind, shape and place in a row; see `make`."""
    keys = jax.random.split(key, 4)
    counts = jnp.stack([jnp.sum(_is_any(label, host.classes)) for host in hosts])
    enough = counts >= _LEAST_ORGAN
    # Evenly among those that are there; any where there is none, which is left alone then.
    host = jnp.argmax(jnp.where(enough, jax.random.uniform(keys[0], counts.shape), -1))
    organ = jnp.zeros(label.shape, bool)
    for index, one in enumerate(hosts):
        organ |= (host == index) & _is_any(label, one.classes)
    taken = _is_any(label, {one.tumor for one in hosts})
    for _ in range(int(np.ceil(_GAP_MM / max(spacing)))):
        taken = online_texture.dilate(taken)
    free = organ & ~taken

    radius = shapes.draw_radius(keys[1], jax.tree.map(lambda n: n[host], radii), 1)[0]
    form = jax.tree.map(lambda n: n[host], forms)
    level, extent = shapes.lattice_level(keys[2], radius, form)
    # Crops lie within what is padded, and where the patch is larger than a crop within the patch.
    most = jnp.asarray([max(0, n - c) for n, c in zip(patch, crop, strict=True)])
    voxel_mm3 = float(np.prod(spacing))

    def attempt(key, scale):
        voxel_key, offset_key = jax.random.split(key)
        centre = _draw_voxel(voxel_key, free)
        corner = jnp.clip(centre - jnp.asarray(crop) // 2, 0, most)
        offset = jax.random.uniform(offset_key, (3,), minval=-0.5, maxval=0.5)
        here = jnp.asarray(spacing)
        sampled = shapes.level_on_grid(level, extent * scale, crop, here, centre - corner + offset)
        mask = (sampled < 0) & jax.lax.dynamic_slice(free, corner, crop)
        return corner, sampled, mask, _volume_radius(jnp.sum(mask) * voxel_mm3)

    tries = jax.vmap(attempt)(jax.random.split(keys[3], len(_TRIES)), jnp.asarray(_TRIES))
    wanted = radius * jnp.asarray(_TRIES)
    whole = counts[host] * voxel_mm3
    fits = jax.vmap(functools.partial(_lies_within, most=most))(tries[2], tries[0])
    good = fits & _is_fit(tries[3], wanted, whole)
    chosen = jnp.argmax(good)
    corner, sampled, mask, _ = (array[chosen] for array in tries)
    # What the organ cut off is no part of the tumour.
    mask = _piece(mask, sampled)
    kept = _volume_radius(jnp.sum(mask) * voxel_mm3)
    found = where & jnp.any(enough) & good[chosen] & _is_fit(kept, wanted[chosen], whole)
    here = jax.lax.dynamic_slice(organ, corner, crop)
    return Placed(corner, mask, sampled, here, host, jnp.maximum(kept, 0.1), found)


def _is_any(label, indices):
    result = jnp.zeros(label.shape, bool)
    for index in sorted(indices):
        result |= label == index
    return result


def _draw_voxel(key: PRNGKeyArray, mask: Bool[Array, "x y z"]) -> Int[Array, "3"]:
    """Draws a voxel of a mask, each as likely as the others; any where the mask is empty."""
    draws = jax.random.uniform(key, (3,))
    place = []
    for axis, draw in enumerate(draws):
        others = tuple(range(1, 3 - axis))
        below = jnp.cumsum(jnp.sum(mask, axis=others))
        index = jnp.searchsorted(below, draw * below[-1], side="right")
        place.append(jnp.minimum(index, mask.shape[0] - 1))
        mask = mask[place[-1]]
    return jnp.stack(place)


def _lies_within(mask, corner, most):
    """Whether a tumour does not reach a border of the crop that is none of the patch."""
    result = jnp.asarray(True)
    for axis in range(3):
        touched = jnp.any(mask, axis=tuple(a for a in range(3) if a != axis))
        result &= ~touched[0] | (corner[axis] == 0)
        result &= ~touched[-1] | (corner[axis] == most[axis])
    return result


def _is_fit(kept, wanted, organ_mm3):
    volume = 4 / 3 * np.pi * kept**3
    return (kept > 0) & (kept >= _KEPT_RADIUS * wanted) & (volume <= _MOST_OF_ORGAN * organ_mm3)


def _volume_radius(mm3):
    return (mm3 * 3 / 4 / np.pi) ** (1 / 3)


def _piece(mask: Bool[Array, "x y z"], level: Float[Array, "x y z"]) -> Bool[Array, "x y z"]:
    """Returns the connected part (26 neighbours) of a mask with its deepest voxel."""
    deepest = jnp.argmin(jnp.where(mask, level, jnp.inf))
    seed = mask & (jnp.arange(mask.size).reshape(mask.shape) == deepest)

    def grow(state):
        part, _ = state
        grown = online_texture.dilate(part) & mask
        return grown, jnp.any(grown != part)

    return jax.lax.while_loop(lambda state: state[1], grow, (seed, jnp.any(seed)))[0]


# ---------------------------------------------------------------------------- looks


def _draw_rules(looks, weights, keys, hu, placed, spacing, window):
    """Hand-written lesions [b, x, y, z] in HU, and their edges' sigmas [b]."""
    textures = online_texture.stack_textures(looks, hu.shape[1:], spacing)

    def one(key, image, organ, mask, level, radius, host):
        look = jax.tree.map(lambda n: n[host], textures)
        key = jax.random.fold_in(key, 1)
        return online_texture.draw_lesion(key, image, organ, mask, level, radius, look, spacing)

    return jax.vmap(one)(
        keys, hu, placed.organ, placed.mask, placed.level, placed.radius_mm, placed.host
    )


def _draw_diffusion(organs, generate, keys, hu, placed, spacing, window):
    """Lesions of a diffusion model [b, x, y, z] in HU, and their edges' sigmas [b]."""
    low, high = window
    with_tumor, without = generate(
        jax.random.fold_in(keys[0], 1),
        jnp.clip((hu - low) / (high - low), 0, 1)[..., None] * 2 - 1,
        placed.mask,
        jnp.asarray(organs, jnp.int32)[placed.host],
        placed.radius_mm.astype(jnp.float32),
    )
    lesion, healthy = (
        jnp.clip((a[..., 0] + 1) / 2, 0, 1) * (high - low) + low for a in (with_tumor, without)
    )
    sigma = [max(2.5 / step, _NOISE_VOXELS) for step in spacing]

    def noise(key, residual, host):
        normal, spread = online_texture.organ_statistics(residual, host, (-jnp.inf, jnp.inf))
        key = jax.random.fold_in(key, 2)
        return online_texture.grain(key, residual, host, normal, spread, sigma)

    lesion += jax.vmap(noise)(keys, hu - healthy, placed.organ)
    edges = jax.vmap(
        lambda key: jax.random.uniform(
            jax.random.fold_in(key, 3), minval=_EDGE_MM[0], maxval=_EDGE_MM[1]
        )
    )(keys)
    return lesion, edges
