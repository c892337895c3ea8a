"""The Universal Model against a torch model written from its published code's description.

The reference here has that code's layers, sizes and names: group norm, ReLU and a 1x1 convolution
to 8 channels on the finest features; group norm, ReLU, mean over voxels and a 1x1 convolution to
256 channels on the coarsest; a controller from those and a class's embedding to the weights and
biases of three grouped convolutions. Its U-Net is described at `unet3d_reference`; its Swin UNETR
is MONAI's with the order of patch merging of that code.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models.torch_weights import export_state_dict, import_state_dict
from tumorjax.training import checkpoints

TINY = {"width": 4}
OLD_MERGING = (
    *([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]),
    *([1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]),
)


def _reference(backbone, coarse, fine, classes, encoding):
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            groups = [np.gcd(16, fine), np.gcd(16, coarse)]
            self.precls_conv = nn.Sequential(
                nn.GroupNorm(groups[0], fine), nn.ReLU(), nn.Conv3d(fine, 8, 1)
            )
            self.GAP = nn.Sequential(
                nn.GroupNorm(groups[1], coarse),
                nn.ReLU(),
                nn.AdaptiveAvgPool3d(1),
                nn.Conv3d(coarse, 256, 1),
            )
            self.controller = nn.Conv3d(512, 153, 1)
            if encoding == "learned":
                self.organ_embedding = nn.Embedding(classes, 256)
            else:
                self.register_buffer("organ_embedding", torch.randn(classes, 512))
                self.text_to_vision = nn.Linear(512, 256)

        def classes_of_one(self, pooled, features):
            if encoding == "learned":
                texts = self.organ_embedding.weight
            else:
                texts = torch.relu(self.text_to_vision(self.organ_embedding))
            context = torch.cat([pooled.reshape(1, 256).expand(classes, 256), texts], 1)
            numbers = self.controller(context[..., None, None, None]).reshape(classes, 153)
            y = features.repeat(1, classes, 1, 1, 1)
            # Weights of all layers come before the biases of all layers.
            for first, size, bias in ((0, 64, 136), (64, 64, 144), (128, 8, 152)):
                weight = numbers[:, first : first + size].reshape(-1, 8, 1, 1, 1)
                offset = numbers[:, bias : bias + size // 8].reshape(-1)
                y = nn.functional.conv3d(y, weight, offset, groups=classes)
                y = torch.relu(y) if first < 128 else y
            return y

        def forward(self, x):
            coarsest, finest = self.backbone(x)
            pooled, features = self.GAP(coarsest), self.precls_conv(finest)
            outputs = [
                self.classes_of_one(pooled[i], features[i : i + 1]) for i in range(x.shape[0])
            ]
            outputs = torch.cat(outputs)
            return torch.cat([torch.zeros_like(outputs[:, :1]), outputs], 1)

    return Reference()


def _swin_backbone(swin_reference, in_channels, **settings):
    torch = pytest.importorskip("torch")
    net = swin_reference(in_channels, 1, order=OLD_MERGING, **settings)
    net.out = torch.nn.Identity()
    seen = {}
    net.encoder10.register_forward_hook(lambda _, inputs, output: seen.update(coarsest=output))
    net.register_forward_hook(lambda _, inputs, output: (seen["coarsest"], output))
    return net


def test_unet_has_the_references_parameters(parameters_of, torch_parameters_of, unet3d_reference):
    def make():
        return _reference(unet3d_reference(1, 32), 512, 64, 32, "learned")

    assert parameters_of("universal", classes=33, encoding="learned") == torch_parameters_of(make)


def test_swin_unetr_has_the_references_parameters(
    parameters_of, torch_parameters_of, swin_reference
):
    def make():
        return _reference(_swin_backbone(swin_reference, 1, feature_size=48), 768, 48, 32, "text")

    assert parameters_of("universal", classes=33, backbone="swin_unetr") == (
        torch_parameters_of(make)
    )


@pytest.mark.parametrize(
    ("shape", "in_channels", "classes", "encoding"),
    [((16, 8, 8), 1, 3, "text"), ((8, 16, 24), 2, 2, "learned")],
)
def test_over_the_unet_equals_the_reference(
    rng, equals_reference, without_kinks, unet3d_reference, shape, in_channels, classes, encoding
):
    model = models.create(
        "universal", classes=classes, in_channels=in_channels, encoding=encoding, **TINY
    )
    reference = _reference(unet3d_reference(in_channels, 4), 64, 8, classes - 1, encoding)
    x = rng.standard_normal((2, *shape, in_channels)).astype(np.float32)
    equals_reference(model, reference, x, gradients=False)
    equals_reference(model, without_kinks(reference), x)


def test_over_swin_unetr_equals_the_reference(rng, equals_reference, swin_reference):
    sizes = {"feature_size": 12, "depths": (1, 1, 1, 1)}
    model = models.create("universal", classes=3, backbone="swin_unetr", **sizes)
    backbone = _swin_backbone(swin_reference, 1, **sizes)
    reference = _reference(backbone, 192, 12, 2, "text")
    x = rng.standard_normal((2, 64, 32, 32, 1)).astype(np.float32)
    equals_reference(model, reference, x, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64, 32), (32, 64, 64)])
def test_gradients_over_swin_unetr_equal_the_references(
    rng, equals_reference, without_kinks, swin_reference, shape
):
    sizes = {"feature_size": 12, "depths": (1, 1, 1, 1)}
    model = models.create("universal", classes=3, backbone="swin_unetr", **sizes)
    backbone = _swin_backbone(swin_reference, 1, **sizes)
    x = rng.standard_normal((1, *shape, 1)).astype(np.float32)
    equals_reference(model, without_kinks(_reference(backbone, 192, 12, 2, "text")), x)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["unet", "swin_unetr"])
def test_full_size_equals_the_reference(
    rng, equals_reference, unet3d_reference, swin_reference, backbone
):
    model = models.create("universal", classes=4, backbone=backbone)
    if backbone == "unet":
        reference = _reference(unet3d_reference(1, 32), 512, 64, 3, "text")
    else:
        reference = _swin_backbone(swin_reference, 1, feature_size=48)
        reference = _reference(reference, 768, 48, 3, "text")
    x = rng.standard_normal((1, 96, 96, 96, 1)).astype(np.float32)
    equals_reference(model, reference, x, gradients=False)


def test_background_is_where_no_class_has_a_positive_output(rng, run_once):
    model = models.create("universal", classes=4, **TINY)
    apply, parameters = models.functional(model)
    x = jnp.asarray(rng.standard_normal((1, 16, 8, 8, 1)), jnp.float32)
    logits = np.asarray(run_once(apply, parameters, x))
    assert logits.shape == (1, 16, 8, 8, 4)
    np.testing.assert_array_equal(logits[..., 0], 0)
    assert np.std(logits[..., 1:]) > 0
    none = (1 / (1 + np.exp(-logits[..., 1:])) < 0.5).all(-1)
    np.testing.assert_array_equal(logits.argmax(-1) == 0, none)


def test_classes_follow_their_embeddings(tmp_path, rng, run_once):
    names = ("liver", "pancreas", "pancreas tumor")
    vectors = {name: rng.standard_normal(20).astype(np.float32) for name in names}
    np.savez(tmp_path / "table.npz", **vectors)
    table = {name: [float(value) for value in vector] for name, vector in vectors.items()}
    (tmp_path / "table.json").write_text(json.dumps(table))
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 16, 1)), jnp.float32)

    def logits(file, order):
        model = models.create(
            "universal", classes=4, embeddings=str(tmp_path / file), class_names=order, **TINY
        )
        apply, parameters = models.functional(model)
        return np.asarray(run_once(apply, parameters, x))

    expected = logits("table.npz", names)
    np.testing.assert_array_equal(logits("table.npz", None), expected)
    turned = logits("table.json", names[::-1])
    np.testing.assert_allclose(turned[..., 1:], expected[..., :0:-1], atol=1e-5)
    assert np.abs(turned - expected).max() > 1e-3
    # A training's classes are looked up by their names.
    config = ConfigDict(
        {
            "task": {"classes": {"pancreas": ["pancreas"], "liver": ["liver"]}},
            "model": {"name": "universal", "embeddings": str(tmp_path / "table.npz"), **TINY},
        }
    )
    built = checkpoints.build_model(config, deep_supervision=False)
    rows = [vectors[name] for name in config.task.classes]
    np.testing.assert_array_equal(built.head.organ_embedding[...], rows)


def test_random_table_is_the_same_for_all_seeds_and_numbers_of_classes():
    tables = [
        models.create("universal", classes=classes, seed=seed, **TINY).head.organ_embedding[...]
        for classes, seed in ((3, 0), (5, 1))
    ]
    np.testing.assert_array_equal(tables[0], tables[1][:2])
    assert np.corrcoef(tables[1]).max(where=~np.eye(4, dtype=bool), initial=-1) < 0.3


def test_only_the_table_depends_on_the_classes(caplog):
    source = models.create("universal", classes=5, seed=1, **TINY)
    weights = export_state_dict(source)
    model = import_state_dict(models.create("universal", classes=3, **TINY), weights)
    assert "organ_embedding [2, 512]" in caplog.text
    np.testing.assert_array_equal(
        export_state_dict(model)["controller.weight"], weights["controller.weight"]
    )
    assert models.fixed_parameters(model) >= {"head.organ_embedding"}


def test_wrong_settings_and_files_are_told(tmp_path):
    (tmp_path / "words.json").write_text('{"liver": [1.0, 2.0], "colon": [1.0]}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "table.npz").write_bytes(b"no zip")
    for settings, message in (
        ({"backbone": "dints"}, "Expected one of unet, swin_unetr"),
        ({"encoding": "speech"}, "Expected one of text, learned"),
        ({"statistics": "population"}, "Expected one of batch"),
        ({"deep_supervision": True}, "no deep supervision"),
        ({"embeddings": "words.json", "encoding": "learned"}, "Leave one of them out"),
        ({"embeddings": "words.json", "class_names": ("liver", "spleen")}, "missing: spleen"),
        ({"embeddings": "words.json", "class_names": ("liver",)}, "for 2 classes"),
        ({"embeddings": "words.json"}, "one length for all"),
        ({"embeddings": "list.json"}, "not readable"),
        ({"embeddings": "table.npz"}, "not readable"),
        ({"embeddings": "nowhere.json"}, "not readable"),
    ):
        if "embeddings" in settings:
            settings["embeddings"] = str(tmp_path / settings["embeddings"])
        with pytest.raises(UserError, match=message):
            models.create("universal", **{"classes": 3, **TINY, **settings})
    with pytest.raises(UserError, match="background and at least one other"):
        models.create("universal", classes=1)
    with pytest.raises(ValueError, match="each axis must divide by"):
        models.create("universal", classes=2, **TINY)(jnp.ones((1, 16, 12, 8, 1)))
