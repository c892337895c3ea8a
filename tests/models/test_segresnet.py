"""SegResNet and SegResNetDS: equality to MONAI's."""

import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError


def _nets():
    pytest.importorskip("torch")
    return pytest.importorskip("monai.networks.nets")


@pytest.mark.parametrize(
    ("patch", "channels", "classes", "upsample_mode"),
    [((8, 12, 16), 1, 3, "nontrainable"), ((12, 8, 8), 2, 5, "deconv")],
)
def test_segresnet_equals_monais(equals_reference, rng, patch, channels, classes, upsample_mode):
    settings = {"blocks_down": (1, 2, 1), "blocks_up": (1, 2), "upsample_mode": upsample_mode}
    reference = _nets().SegResNet(
        init_filters=8, in_channels=channels, out_channels=classes, **settings
    )
    model = models.create("segresnet", classes=classes, in_channels=channels, **settings)
    x = rng.standard_normal((2, *patch, channels)).astype(np.float32)
    equals_reference(model, reference, x)


@pytest.mark.parametrize(
    ("patch", "channels", "classes", "options"),
    [
        ((8, 12, 16), 1, 3, {"dsdepth": 2}),
        ((12, 8, 8), 2, 5, {"upsample_mode": "nontrainable", "dsdepth": 1}),
        ((12, 8, 3), 1, 2, {"resolution": (1.0, 0.5, 4.0), "dsdepth": 2, "groups": 2}),
    ],
)
def test_segresnet_ds_equals_monais(equals_reference, rng, patch, channels, classes, options):
    settings = {"init_filters": 4, "blocks_down": (1, 2, 1), "blocks_up": (1, 2)} | options
    groups = settings.pop("groups", None)
    norm = ("group", {"num_groups": groups}) if groups else ("instance", {"affine": True})
    reference = _nets().SegResNetDS(
        in_channels=channels, out_channels=classes, norm=norm, **settings
    )
    if groups:
        settings |= {"norm": "group", "groups": groups}
    model = models.create(
        "segresnet",
        variant="segresnet_ds",
        classes=classes,
        in_channels=channels,
        deep_supervision=options["dsdepth"] > 1,
        **settings,
    )
    x = rng.standard_normal((2, *patch, channels)).astype(np.float32)
    equals_reference(model, reference, x)


@pytest.mark.parametrize("init_filters", [8, 16, 32])
def test_segresnet_has_monais_parameters(parameters_of, torch_parameters_of, init_filters):
    nets = _nets()
    found = parameters_of("segresnet", init_filters=init_filters, classes=3)
    reference = torch_parameters_of(
        lambda: nets.SegResNet(init_filters=init_filters, out_channels=3)
    )
    assert found == reference


def test_segresnet_ds_has_monais_parameters(parameters_of, torch_parameters_of):
    nets = _nets()
    blocks = (1, 2, 2, 4, 4)
    found = parameters_of(
        "segresnet", variant="segresnet_ds", blocks_down=blocks, dsdepth=4, classes=3
    )
    reference = torch_parameters_of(
        lambda: nets.SegResNetDS(
            init_filters=32, out_channels=3, blocks_down=blocks, dsdepth=4, norm="INSTANCE"
        )
    )
    assert found == reference


@pytest.mark.slow
@pytest.mark.parametrize("init_filters", [8, 16])
def test_full_size_equals_monais(equals_reference, rng, init_filters):
    reference = _nets().SegResNet(init_filters=init_filters, out_channels=3)
    model = models.create("segresnet", init_filters=init_filters, classes=3)
    x = rng.standard_normal((1, 48, 32, 32, 1)).astype(np.float32)
    equals_reference(model, reference, x, full_size=True)


@pytest.mark.slow
def test_full_size_ds_equals_monais(equals_reference, rng):
    blocks = (1, 2, 2, 4, 4)
    reference = _nets().SegResNetDS(
        init_filters=32, out_channels=3, blocks_down=blocks, dsdepth=4, norm="INSTANCE"
    )
    settings = {"variant": "segresnet_ds", "blocks_down": blocks, "deep_supervision": True}
    model = models.create("segresnet", classes=3, **settings)
    x = rng.standard_normal((1, 48, 32, 32, 1)).astype(np.float32)
    equals_reference(model, reference, x, full_size=True)


def test_remat_changes_nothing(rng):
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(rng.standard_normal((1, 4, 4, 8, 1)), jnp.float32)
    gradients = []
    for remat in (False, True):
        model = models.create("segresnet", classes=2, blocks_down=(1, 1), remat=remat)
        apply, parameters = models.functional(model)
        loss = jax.jit(jax.grad(lambda p, f=apply: jnp.square(f(p, x)).mean()))
        gradients.append(loss(parameters))
    for name, value in gradients[0].items():
        scale = max(1e-3, float(jnp.abs(value).max()))
        np.testing.assert_allclose(gradients[1][name], value, atol=1e-4 * scale, err_msg=name)


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="are SegResNetDS's"):
        models.create("segresnet", classes=2, deep_supervision=True)
    with pytest.raises(UserError, match=r"model\.norm is 'batch'. Expected one of group, instance"):
        models.create("segresnet", classes=2, norm="batch")
    with pytest.raises(UserError, match=r"must divide by model\.groups, 8"):
        models.create("segresnet", classes=2, init_filters=12)
    with pytest.raises(UserError, match="one number of blocks fewer upwards"):
        models.create("segresnet", classes=2, blocks_up=(1, 1))
    with pytest.raises(ValueError, match=r"must divide by \(8, 8, 8\)"):
        models.create("segresnet", classes=2)(np.ones((1, 8, 8, 12, 1), np.float32))
