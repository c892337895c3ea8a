"""Synthesizers: what draws a tumour into a crop of a scan.

A synthesizer is a name, the prior of its shapes, and one function from a crop with a mask to a
crop with a tumour. "rules" draws tumours by hand-written rules, "diffusion" by a trained model;
another enters by its line in `SYNTHESIZERS`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from tumorjax.errors import UserError
from tumorjax.synthesis import diffusion_render, shapes, texture


class Render(Protocol):
    """Draws one tumour into a crop: what a synthesizer is about."""

    def __call__(
        self,
        key: PRNGKeyArray,
        image: Float[np.ndarray, "x y z"],
        organ: Bool[np.ndarray, "x y z"],
        tumor: Bool[np.ndarray, "x y z"],
        spacing: tuple[float, float, float],
    ) -> Float[np.ndarray, "x y z"]:
        """Returns the crop in HU with a tumour at `tumor`, untouched where it does not change.

        Args:
            key: jax.random key.
            image: crop, HU.
            organ: host organ without other tumours.
            tumor: the tumour's mask.
            spacing: (x, y, z) in mm.
        """
        ...


@dataclass(frozen=True)
class Synthesizer:
    """Makes tumours of one organ.

    Attributes:
        name: as in `SYNTHESIZERS`, for records.
        organ: organ group, such as "liver" or "kidney".
        prior: where sizes and shapes come from, see `shapes`.
        context_mm: how much of the scan around a tumour `render` is given.
        render: draws one tumour.
        record: JSON-able, all that decides how its tumours look beside name, organ and prior.
        largest_mm: extent (x, y, z) of the largest tumour that it draws; None for any.
        grid: spacing (mm) and window (HU) that it was trained on; None where it knows all.
    """

    name: str
    organ: str
    prior: str
    context_mm: float
    render: Render
    record: Mapping[str, Any] = field(default_factory=dict)
    largest_mm: tuple[float, float, float] | None = None
    grid: Mapping[str, tuple[float, ...]] | None = None


def rule_based(organ: str, prior: str = "difftumor", **changes: Any) -> Synthesizer:
    """Returns the synthesizer of hand-written tumours.

    Args:
        organ: organ group: liver, pancreas, kidney, colon, esophagus or uterus.
        prior: "difftumor" or "measured", see `shapes`.
        **changes: fields of `texture.Texture` that are to differ from the organ's own.

    Raises:
        UserError: organ, prior or a field is unknown.
    """
    if organ not in texture.TEXTURES:
        raise UserError(
            f"there are no tumours of {organ!r}. Expected one of {', '.join(texture.TEXTURES)}"
        )
    shapes.prior_used(organ, prior)
    unknown = sorted(set(changes) - set(texture.Texture._fields))
    if unknown:
        raise UserError(
            f"texture settings {', '.join(unknown)} are unknown. Expected some of"
            f" {', '.join(texture.Texture._fields)}"
        )
    look = texture.TEXTURES[organ]._replace(**changes)

    def render(key, image, organ, tumor, spacing):
        return texture.render(key, image, organ, tumor, spacing, look)

    record = {"texture": {key: _plain(value) for key, value in sorted(changes.items())}}
    return Synthesizer("rules", organ, prior, texture.CONTEXT_MM, render, record)


def diffusion(
    organ: str,
    prior: str = "difftumor",
    checkpoint: str = "",
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> Synthesizer:
    """Returns the synthesizer of tumours that a diffusion model draws.

    Args:
        organ: organ group, one of those that the model was trained on.
        prior: of sizes and shapes: "difftumor" or "measured", see `shapes`.
        checkpoint: workdir of a job "diffusion".
        sampler: see `diffusion_render.open_model`.
        steps: of the sampler.
        guidance: classifier-free.

    Raises:
        UserError: there is no such model, or it does not know the organ.
    """
    shapes.prior_used(organ, prior)
    model = diffusion_render.open_model(checkpoint, sampler, steps, guidance)
    return of_model(organ, prior, model)


def of_model(organ: str, prior: str, model: diffusion_render.Model) -> Synthesizer:
    """Returns the synthesizer of an open diffusion model, see `diffusion`.

    Raises:
        UserError: the model does not know the organ.
    """
    trained = model.trained
    if organ not in trained.organs:
        raise UserError(
            f"the diffusion model draws no tumours of {organ!r}: it was trained on those of"
            f" {', '.join(trained.organs)}. Choose one of these, or another checkpoint"
        )
    return Synthesizer(
        "diffusion",
        organ,
        prior,
        diffusion_render.context(trained),
        functools.partial(
            diffusion_render.render, trained=trained, organ_index=trained.organs.index(organ)
        ),
        {"model": dict(model.record)},
        diffusion_render.largest_tumor(trained),
        {"spacing": tuple(trained.spacing), "window": tuple(trained.window)},
    )


SYNTHESIZERS: dict[str, Callable[..., Synthesizer]] = {
    "rules": rule_based,
    "diffusion": diffusion,
}
# The settings of each, beside the organ; of "rules" also the fields of `texture.Texture`.
_SETTINGS = {
    "rules": ("prior",),
    "diffusion": ("prior", "checkpoint", "sampler", "steps", "guidance"),
}


def create(name: str, organ: str, **settings: Any) -> Synthesizer:
    """Returns the synthesizer of a name for an organ.

    Raises:
        UserError: the name is unknown, or the settings are not this synthesizer's.
    """
    if name not in SYNTHESIZERS:
        raise UserError(f"synthesizer {name!r} is unknown. Expected {', '.join(SYNTHESIZERS)}")
    if name != "rules" and (unknown := sorted(set(settings) - set(_SETTINGS[name]))):
        raise UserError(
            f"synthesizer {name!r} has no settings {', '.join(unknown)}. Expected some of"
            f" {', '.join(_SETTINGS[name])}"
        )
    return SYNTHESIZERS[name](organ, **settings)


def from_settings(organ: str, settings: Mapping[str, Any]) -> Synthesizer:
    """Returns the synthesizer that a configuration describes, for an organ.

    Args:
        organ: organ group.
        settings: `synthesizer` (default "rules"); of its settings those that are there and not
            None: `prior`, for "rules" `texture` (organ -> changes of its texture), for "diffusion"
            `checkpoint`, `sampler`, `steps` and `guidance`. Others are not looked at.

    Raises:
        UserError: see `create`.
    """
    name = settings.get("synthesizer", "rules")
    given = {
        key: settings[key] for key in _SETTINGS.get(name, ()) if settings.get(key) not in (None, "")
    }
    if name == "rules":
        given |= dict((settings.get("texture") or {}).get(organ) or {})
    return create(name, organ, **given)


def check_grid(synthesizer: Synthesizer, url: str, settings: Mapping[str, Any]) -> None:
    """Checks that a store has the spacing and window that a synthesizer was trained on.

    Args:
        synthesizer: to be used on the store's scans.
        url: of the store, for the message.
        settings: the store's.

    Raises:
        UserError: it has others, says which.
    """
    for key, wanted in (synthesizer.grid or {}).items():
        found = tuple(float(value) for value in settings.get(key, ()))
        if found != tuple(map(float, wanted)):
            raise UserError(
                f"{url}: made with {key} {_text(found)}, and synthesizer {synthesizer.name!r} was"
                f" trained with {key} {_text(wanted)}. Train one on this store's {key}, or prepare"
                " the scans with the model's"
            )


def _text(values) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
