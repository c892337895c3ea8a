"""Fine-tuning: what starts, what stays, what moves less, and that continuing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.segmentation import get_config
from tumorjax import models, parallel
from tumorjax.clock import Clock
from tumorjax.errors import UserError
from tumorjax.training import checkpoints, finetuning, schedules, segmenter
from tumorjax.volumes import open_store, write_case

SPACING = (4.0, 4.0, 4.0)
NAMES = ("stem.conv.kernel", "stem.norm.scale", "encoder.0.kernel", "encoder.1.kernel", "heads.0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(4)
    url = tmp_path_factory.mktemp("store")
    settings = {"spacing": list(SPACING), "window": [-175.0, 250.0]}
    image = rng.random((20, 18, 16), np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[4:12, 4:12, 4:12] = 5  # liver
    label[6:9, 6:9, 6:9] = 27  # liver_lesion
    write_case(url, "a", image, label, SPACING, {"patient": "a"}, settings)
    return open_store(url)


def _config(**training):
    config = get_config()
    config.model.widths = (4, 8)
    config.model.blocks = (1, 1)
    config.training.patch_size = (8, 8, 8)
    config.training.steps = 4
    config.training.save_every = 2
    config.training.log_every = 1
    config.training.optimizer = "sgd"
    config.training.schedule = "poly"
    for name, value in training.items():
        config.training[name] = value
    return config


def _train(config, store, folder, **arguments):
    folder.mkdir(parents=True, exist_ok=True)
    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])
    sources = [(store, case) for case in store.cases]
    apply = segmenter.train_segmenter(config, sources, folder, mesh, clock=Clock(), **arguments)
    return jax.tree.map(np.asarray, apply.args[0])


def _initial(config, seed=None):
    model = checkpoints.build_model(
        config, deep_supervision=False, seed=config.seed if seed is None else seed
    )
    return models.functional(model)[1]


@pytest.fixture(scope="module")
def source(store, tmp_path_factory):
    """A finished training of another seed, and its parameters."""
    folder = tmp_path_factory.mktemp("source")
    config = _config(steps=1)
    config.seed = 9
    return folder, _train(config, store, folder)


def test_a_training_starts_with_the_logits_of_what_it_starts_from(source, rng):
    folder, trained = source
    config = _config(start_from=str(folder))
    start = finetuning.starting_parameters(str(folder), config, _initial(config))
    apply, _ = checkpoints.load_model(folder)
    x = jnp.asarray(rng.random((1, 8, 8, 8, 1)), jnp.float32)
    function = jax.jit(apply.func)
    np.testing.assert_array_equal(function(start, x), function(apply.args[0], x))
    assert not np.array_equal(function(start, x), function(_initial(config), x))


def test_frozen_parts_stay_as_they_started_and_a_stopped_run_goes_on_alike(source, store, tmp_path):
    folder, trained = source
    config = _config(
        start_from=str(folder),
        freeze=("stem", r"encoder\.0\."),
        layer_learning_rates=(("encoder", 0.5),),
        optimizer="adamw",
    )
    whole = _train(config, store, tmp_path / "whole")
    for name, value in whole.items():
        same = np.array_equal(value, trained[name])
        assert same == name.startswith(("stem.", "encoder.0.")), name

    class Killed(Exception):
        pass

    def kill(step, row):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        _train(config, store, tmp_path / "stopped", progress=kill)
    # What it started from is neither needed nor looked at again.
    moved = folder.rename(folder.with_name("moved"))
    try:
        continued = _train(config, store, tmp_path / "stopped")
    finally:
        moved.rename(folder)
    for name, value in whole.items():
        np.testing.assert_array_equal(continued[name], value, err_msg=name)


def test_the_first_update_is_scaled_by_its_factor(rng):
    settings = _config().training
    values = {name: jnp.asarray(rng.standard_normal(5), jnp.float32) for name in NAMES}
    gradients = {name: jnp.asarray(rng.standard_normal(5) * 9, jnp.float32) for name in NAMES}
    factors = finetuning.learning_rate_factors(
        {"layer_learning_rates": ((r"encoder\.1", 0.1), ("encoder", 0.25))}, NAMES
    )
    assert factors == dict(zip(NAMES, (1, 1, 0.25, 0.1, 1), strict=True))
    plain = schedules.optimizer(settings, 100)
    layered = schedules.optimizer(settings, 100, factors)
    expected, _ = plain.update(gradients, plain.init(values), values)
    found, _ = layered.update(gradients, layered.init(values), values)
    for name in NAMES:
        np.testing.assert_allclose(found[name], factors[name] * expected[name], rtol=1e-6)


def test_frozen_gradients_do_not_count_in_the_norm_that_is_clipped(rng):
    settings = _config(clip=1.0).training
    values = {name: jnp.asarray(rng.standard_normal(5), jnp.float32) for name in NAMES}
    gradients = {name: jnp.asarray(rng.standard_normal(5) * 9, jnp.float32) for name in NAMES}
    factors = finetuning.learning_rate_factors({"freeze": ("stem",)}, NAMES)
    layered = schedules.optimizer(settings, 100, factors)
    found, _ = layered.update(gradients, layered.init(values), values)
    rest = {n: v for n, v in gradients.items() if not n.startswith("stem")}
    alone = schedules.optimizer(settings, 100)
    kept = {n: values[n] for n in rest}
    expected, _ = alone.update(rest, alone.init(kept), kept)
    for name in rest:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    assert not any(np.any(found[name]) for name in NAMES if name.startswith("stem"))


def test_neutral_settings_leave_the_optimizer_as_it_is():
    assert finetuning.learning_rate_factors(_config().training, NAMES) is None
    neutral = {"layer_learning_rates": (("encoder", 1.0),)}
    assert finetuning.learning_rate_factors(neutral, NAMES) is None
    assert finetuning.learning_rate_factors({}, NAMES) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("bottleneck",)}, "begins with 'bottleneck'. Names begin with encoder, heads"),
        ({"freeze": ("en(",)}, "no regular expression"),
        ({"freeze": ("",)}, "no parameter to train"),
        ({"freeze": (3,)}, "Expected patterns"),
        ({"layer_learning_rates": (("decoder", 0.1),)}, "begins with 'decoder'"),
        ({"layer_learning_rates": (("encoder", -1),)}, "a factor from 0"),
        ({"layer_learning_rates": ("encoder",)}, "Expected pairs"),
    ],
)
def test_patterns_and_factors_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        finetuning.learning_rate_factors(settings, NAMES)


def test_a_pattern_that_matches_nothing_is_told_before_anything_trains(store, tmp_path):
    with pytest.raises(UserError, match=r"training\.freeze: no parameter"):
        _train(_config(freeze=("bottleneck",)), store, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_heads_are_made_anew_for_other_classes_and_it_says_so(source, caplog):
    folder, trained = source
    config = _config()
    config.task.classes = {"liver": ("liver",), "spleen": ("spleen",)}
    initial = _initial(config)
    start = finetuning.starting_parameters(str(folder), config, initial)
    assert "kidney, kidney_lesion, and the task is liver, spleen: its heads are re-made" in (
        caplog.text
    )
    for name, value in start.items():
        expected = initial[name] if name.startswith("heads.") else trained[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_what_cannot_be_started_from_is_named(source, tmp_path, rng):
    folder, trained = source
    config = _config()
    initial = _initial(config)
    with pytest.raises(UserError, match=r"nowhere: training\.start_from is no folder"):
        finetuning.starting_parameters("nowhere", config, initial)
    wide = _config()
    wide.model.widths = (4, 10)
    with pytest.raises(UserError, match=r"weights of another network .*\[4\] there|encoder\.1"):
        finetuning.starting_parameters(str(folder), wide, _initial(wide))
    broken = tmp_path / "weights.pth"
    broken.write_bytes(rng.bytes(100))
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"weights\.pth"):
        finetuning.starting_parameters(str(broken), config, initial)


def test_a_file_of_pytorch_weights_is_a_start(source, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from tumorjax.models import torch_weights

    folder, trained = source
    config = _config()
    model = checkpoints.build_model(config, deep_supervision=False, seed=5)
    weights = torch_weights.export_state_dict(model)
    torch.save({"state_dict": {k: torch.tensor(v) for k, v in weights.items()}}, tmp_path / "w.pt")
    start = finetuning.starting_parameters(str(tmp_path / "w.pt"), config, _initial(config))
    for name, value in models.functional(model)[1].items():
        np.testing.assert_array_equal(start[name], value, err_msg=name)

    config.task.classes = {"liver": ("liver",)}
    initial = _initial(config)
    start = finetuning.starting_parameters(str(tmp_path / "w.pt"), config, initial)
    assert "re-made" in caplog.text
    np.testing.assert_array_equal(start["heads.0.kernel"], initial["heads.0.kernel"])
