"""What holds for every network."""

import jax
import numpy as np
import pytest

from configs import scaling
from tumorjax import models
from tumorjax.training.checkpoints import build_model


@pytest.mark.parametrize("name", models.NETWORKS)
def test_the_default_study_can_be_run_with_every_network(name):
    config = scaling.get_config()
    config.model.name = name

    def logits():
        apply, parameters = models.functional(build_model(config, deep_supervision=False))
        return apply(parameters, np.zeros((2, *config.training.patch_size, 1), np.float32))

    assert jax.eval_shape(logits).shape == (2, 32, 32, 32, 3)


@pytest.mark.parametrize(
    ("variant", "millions"),
    # MONAI's SegResNet(init_filters=32, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)) has 18.8.
    [("paper", 62.8), ("paper_pancreas", 18.8)],
)
def test_the_papers_studies_have_the_papers_networks(variant, millions):
    config = scaling.get_config(variant)

    def parameters():
        return models.functional(
            build_model(config, deep_supervision=config.training.deep_supervision)
        )[1]

    count = sum(int(np.prod(value.shape)) for value in jax.eval_shape(parameters).values())
    assert count / 1e6 == pytest.approx(millions, rel=5e-3)


def test_settings_beside_a_small_preset_take_its_place():
    wide = models.create("resenc_unet", preset="small", widths=(4, 8), blocks=(1, 1), classes=2)
    assert wide.divisor == (2, 2, 2)
