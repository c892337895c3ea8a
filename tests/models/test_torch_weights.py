"""Weights from PyTorch and back: checkpoints, prefixes, heads, and what does not fit."""

import collections
import datetime
import logging
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models.torch_weights import (
    export_state_dict,
    import_state_dict,
    read_checkpoint,
    read_state_dict,
    write_checkpoint,
)

SETTINGS = {"widths": (2, 4), "blocks": (1, 1), "deep_supervision": True}
STEM = "encoder.stem.convs.0.conv.weight"
HEAD = "decoder.seg_layers.0.weight"


def _network(classes=3, seed=0, **settings):
    return models.create("resenc_unet", classes=classes, seed=seed, **{**SETTINGS, **settings})


def _weights(rng, **settings) -> dict[str, np.ndarray]:
    """A state_dict of random weights."""
    zero = export_state_dict(_network(**settings))
    return {key: rng.standard_normal(v.shape).astype(np.float32) for key, v in zero.items()}


def _parameters(model):
    return models.functional(model)[1]


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_import_takes_what_export_gives_and_leaves_the_model_alone():
    source, target = _network(seed=1), _network(seed=2)
    before = {name: np.asarray(value) for name, value in _parameters(target).items()}
    weights = export_state_dict(source)
    _assert_same(_parameters(import_state_dict(target, weights)), _parameters(source))
    _assert_same(_parameters(target), before)
    assert any(np.any(before[name] != value) for name, value in _parameters(source).items())


def test_layouts_are_pytorchs(rng):
    model = _network()
    weights, ours = export_state_dict(model), _parameters(model)
    kernel = ours["encoder.1.blocks.0.conv1.conv.kernel"]
    np.testing.assert_array_equal(
        weights["encoder.stages.1.blocks.0.conv1.conv.weight"][3, 1, 0, 2, 1], kernel[0, 2, 1, 1, 3]
    )
    grown = weights["decoder.transpconvs.0.weight"]
    assert grown.shape == (4, 2, 2, 2, 2)
    assert grown[3, 1, 0, 1, 1] == ours["transposed.0.kernel"][0, 1, 1, 3, 1]


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "module.backbone.", "net."],
)
def test_prefixes_are_taken_off(rng, prefix):
    model = _network(seed=4)
    weights = {prefix + key: value for key, value in export_state_dict(model).items()}
    _assert_same(_parameters(import_state_dict(_network(seed=5), weights)), _parameters(model))


def test_torch_tensors_of_half_precision_are_taken(rng):
    torch = pytest.importorskip("torch")
    weights = _weights(rng)
    halves = {key: torch.from_numpy(value).bfloat16() for key, value in weights.items()}
    found = export_state_dict(import_state_dict(_network(), halves))
    assert found[STEM].dtype == np.float32
    np.testing.assert_array_equal(found[STEM], halves[STEM].float().numpy())


def test_what_does_not_fit_is_listed_by_name_and_shape(rng):
    weights = export_state_dict(_network())
    missing = "encoder.stages.1.blocks.0.conv2.conv.bias"
    del weights[missing]
    weights["decoder.attention.weight"] = rng.standard_normal((5, 7))
    weights[STEM] = rng.standard_normal((2, 3, 3, 3, 3))
    with pytest.raises(UserError) as error:
        import_state_dict(_network(), weights)
    text = str(error.value)
    assert f"missing: {missing} [4]" in text
    assert "extra: decoder.attention.weight [5, 7]" in text
    assert f"{STEM} [2, 3, 3, 3, 3], expected [2, 1, 3, 3, 3]" in text


def test_weights_of_another_network_are_refused(rng):
    weights = {f"layer{i}.weight": rng.standard_normal((2, 2)) for i in range(50)}
    for strict in (True, False):
        with pytest.raises(UserError, match=r"missing: .*and \d+ more.*extra: .*and 30 more"):
            import_state_dict(_network(), weights, strict=strict)


def test_without_strict_what_fits_is_taken_and_the_rest_told(rng, caplog):
    weights = export_state_dict(_network(seed=1))
    initial = _parameters(_network(seed=2))
    del weights[STEM]
    weights["ema.decay"] = np.float32(rng.random())
    with caplog.at_level(logging.WARNING):
        model = import_state_dict(_network(seed=2), weights, strict=False)
    found = _parameters(model)
    np.testing.assert_array_equal(found["stem.conv.kernel"], initial["stem.conv.kernel"])
    name = "encoder.1.blocks.0.conv1.conv.kernel"
    np.testing.assert_array_equal(found[name], _parameters(_network(seed=1))[name])
    assert STEM in caplog.text
    assert "ema.decay []" in caplog.text


def test_heads_are_remade_where_only_the_classes_differ(rng, caplog):
    weights = export_state_dict(_network(classes=5, seed=1))
    with caplog.at_level(logging.WARNING):
        model = import_state_dict(_network(classes=3, seed=2), weights)
    found, initial = _parameters(model), _parameters(_network(classes=3, seed=2))
    trained = _parameters(_network(classes=5, seed=1))
    for name, value in found.items():
        expected = initial if name.startswith("heads.") else trained
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert "heads are re-made" in caplog.text
    assert f"{HEAD} [3, 2, 1, 1, 1], in the state_dict [5, 2, 1, 1, 1]" in caplog.text
    with pytest.raises(
        UserError, match=r"seg_layers\.0\.weight \[5, 2, 1, 1, 1\], expected \[3, 2"
    ):
        import_state_dict(_network(), weights, remake_heads=False)


def test_heads_of_other_features_are_no_heads_to_remake(rng):
    weights = export_state_dict(_network(classes=5))
    weights[HEAD] = rng.standard_normal((5, 9, 1, 1, 1))
    with pytest.raises(UserError, match=r"of another shape: decoder\.seg_layers\.0\.weight"):
        import_state_dict(_network(), weights)


def test_nothing_is_loaded_where_shapes_do_not_fit(rng):
    # The model has shapes alone: were an array asked for, this would be another error.
    abstract = models.nnx.eval_shape(lambda: _network())
    weights = export_state_dict(_network()) | {STEM: rng.standard_normal((3, 1, 3, 3, 3))}
    with pytest.raises(UserError, match="of another shape"):
        import_state_dict(abstract, weights)


def test_a_network_of_shapes_alone_is_filled(rng):
    abstract = models.nnx.eval_shape(lambda: _network())
    source = _network(seed=3)
    filled = import_state_dict(abstract, export_state_dict(source))
    _assert_same(_parameters(filled), _parameters(source))
    apply, parameters = models.functional(filled)
    x = jnp.asarray(rng.standard_normal((1, 4, 4, 4, 1)), jnp.float32)
    assert jax.jit(apply)(parameters, x)[0].shape == (1, 4, 4, 4, 3)


def _wrappers(weights):
    scalar = np.float64(0.25)
    return {
        "plain": weights,
        "monai": {"epoch": 7, "state_dict": weights},
        "net": {"net": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}},
        "nnunet": {
            "network_weights": weights,
            "optimizer_state": {"state": {0: {"momentum_buffer": weights[STEM]}}},
            "grad_scaler_state": None,
            "logging": {"train_losses": [scalar, np.float32(1.5)], "dice": [[np.float64(0.1)]]},
            "_best_ema": scalar,
            "current_epoch": np.int64(3),
            "init_args": {"plans": {"name": "x"}, "fold": 0, "configuration": "3d_fullres"},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
            "counts": np.arange(4),
            "done": np.bool_(True),
        },
    }


@pytest.mark.parametrize("kind", ["plain", "monai", "net", "nnunet"])
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_in_the_usual_checkpoints(rng, tmp_path, kind, legacy):
    torch = pytest.importorskip("torch")
    weights = _weights(rng)
    tensors = {f"module.{key}": torch.from_numpy(value) for key, value in weights.items()}
    tensors[f"module.{STEM}"] = tensors[f"module.{STEM}"].half()
    contents = _wrappers(collections.OrderedDict(tensors) | {STEM: torch.zeros(1)})[kind]
    inner = (
        contents if kind == "plain" else next(v for v in contents.values() if isinstance(v, dict))
    )
    del inner[STEM]
    torch.save(contents, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "x.pth")
    assert found[STEM].dtype == np.float32
    np.testing.assert_array_equal(found.pop(STEM), weights.pop(STEM).astype(np.float16))
    _assert_same(found, weights)
    if kind == "nnunet":
        assert read_checkpoint(tmp_path / "x.pth")["logging"]["train_losses"] == [0.25, 1.5]


class _Runs:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.system, eval, getattr, datetime.timedelta, np.load])
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_file_that_would_run_code_is_refused(tmp_path, rng, call, plain_pickle):
    torch = pytest.importorskip("torch")
    path, trace = tmp_path / "x.pth", tmp_path / "trace"
    argument = f"touch {trace}" if call is os.system else f"open({str(trace)!r}, 'w')"
    contents = {"state_dict": {"weight": torch.ones(2)}, "extra": _Runs(call, argument)}
    if plain_pickle:
        path.write_bytes(pickle.dumps({"extra": contents["extra"]}, protocol=2))
    else:
        torch.save(contents, path)
    with pytest.raises(UserError, match="is refused") as error:
        read_state_dict(path)
    if not plain_pickle:
        assert call.__name__ in str(error.value)
    assert not trace.exists()


def test_files_that_are_no_checkpoints_are_told(tmp_path, rng):
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / "none.pth")
    noise = tmp_path / "noise.pth"
    noise.write_bytes(rng.bytes(1000))
    with pytest.raises(UserError, match=r"noise\.pth is"):
        read_state_dict(noise)
    torch.save({"state_dict": {"weight": torch.rand(1000)}}, tmp_path / "whole.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes((tmp_path / "whole.pth").read_bytes()[:-300])
    with pytest.raises(UserError, match=r"cut\.pth is not a checkpoint"):
        read_state_dict(cut)
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "log.pth")
    with pytest.raises(UserError, match="it holds epoch, loss"):
        read_state_dict(tmp_path / "log.pth")


def test_checkpoints_are_written_as_pytorch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    weights = export_state_dict(_network(seed=9))
    contents = {"network_weights": weights, "init_args": {"fold": 0}, "axes": (0, 1)}
    write_checkpoint(tmp_path / "x.pth", contents)
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert (found["init_args"], found["axes"]) == ({"fold": 0}, (0, 1))
    _assert_same({k: v.numpy() for k, v in found["network_weights"].items()}, weights)
    assert os.listdir(tmp_path) == ["x.pth"]
    # Weights that the reference repeats are stored once.
    again = STEM.replace(".conv.", ".all_modules.0.")
    assert found["network_weights"][again].data_ptr() == found["network_weights"][STEM].data_ptr()
