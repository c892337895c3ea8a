"""Training: the same on eight devices as on one, and the same stopped and continued as not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.segmentation import get_config
from tumorjax import models, parallel
from tumorjax.clock import Clock
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.training import loop, segmenter
from tumorjax.training.checkpoints import build_model, load_model, open_manager
from tumorjax.volumes import open_store, write_case

SPACING = (4.0, 4.0, 4.0)


@pytest.fixture
def store(tmp_path, rng):
    url = tmp_path / "store"
    settings = {"spacing": list(SPACING), "window": [-175.0, 250.0]}
    for case in ("a", "b"):
        image = rng.random((20, 18, 16), np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[4:12, 4:12, 4:12] = 5  # liver
        label[6:9, 6:9, 6:9] = 27  # liver_lesion
        image[label == 27] *= 0.3
        write_case(url, case, image, label, SPACING, {"patient": case}, settings)
    return open_store(url)


def _config(**training):
    config = get_config()
    config.model.widths = (4, 8)
    config.model.blocks = (1, 1)
    config.training.patch_size = (8, 8, 8)
    config.training.batch_size = 8
    config.training.steps = 4
    config.training.save_every = 2
    config.training.log_every = 1
    for name, value in training.items():
        config.training[name] = value
    return config


def _train(config, store, folder, devices=1, transform=None, hosts=(), **sizes):
    folder.mkdir(parents=True, exist_ok=True)
    mesh = parallel.make_mesh(sizes or {"data": devices}, jax.devices()[:devices])
    sources = [(store, case) for case in store.cases]
    apply = segmenter.train_segmenter(
        config, sources, folder, mesh, clock=Clock(), transform=transform, hosts=hosts
    )
    return jax.tree.map(np.asarray, apply.args[0])


def test_eight_devices_train_as_one_does(store, tmp_path):
    # Not AdamW: a bias before a norm has no gradient but rounding, which AdamW makes steps of.
    config = _config(optimizer="sgd")
    one = _train(config, store, tmp_path / "one")
    eight = _train(config, store, tmp_path / "eight", 8, data=4, fsdp=2)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, atol=2e-4, err_msg=name)
    curves = [read_csv(tmp_path / name / "metrics.csv") for name in ("one", "eight")]
    for a, b in zip(*curves, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


def test_continued_training_ends_with_the_same_bits(store, tmp_path, monkeypatch):
    whole = _train(_config(), store, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step, row):
        if step == 3:
            raise Killed

    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])
    sources = [(store, case) for case in store.cases]
    folder = tmp_path / "stopped"
    folder.mkdir()
    with pytest.raises(Killed):
        segmenter.train_segmenter(_config(), sources, folder, mesh, clock=Clock(), progress=kill)
    with open_manager(folder) as manager:
        assert manager.latest_step() == 2
    continued = _train(_config(), store, folder)
    for name, value in whole.items():
        np.testing.assert_array_equal(continued[name], value, err_msg=name)
    assert [row["step"] for row in read_csv(folder / "metrics.csv")] == ["1", "2", "3", "4"]


def _noisy(weights, key, image, label, where):
    """Adds noise of a strength to marked rows, of random numbers that depend on the row alone."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(image)))
    noise = jax.vmap(lambda one: jax.random.normal(one, image.shape[1:]))(keys)
    changed = image + weights["strength"] * noise
    return jnp.where(where[:, None, None, None, None], changed, image), label


def test_a_transform_changes_the_rows_of_its_hosts_in_each_step(store, tmp_path):
    config = _config(optimizer="sgd")
    plain = _train(config, store, tmp_path / "plain")
    transform = segmenter.Transform(_noisy, {"strength": jnp.asarray(0.5)})
    for name, hosts, same in (("none", (), True), ("one", (1,), False)):
        trained = _train(config, store, tmp_path / name, transform=transform, hosts=hosts)
        apart = max(np.abs(trained[key] - value).max() for key, value in plain.items())
        assert apart < 1e-6 if same else apart > 1e-5
    # A transform without effect is none.
    silent = segmenter.Transform(_noisy, {"strength": jnp.asarray(0.0)})
    trained = _train(config, store, tmp_path / "silent", transform=silent, hosts=(0, 1))
    for name, value in plain.items():
        np.testing.assert_allclose(trained[name], value, atol=1e-5, err_msg=name)


def test_a_transform_does_on_eight_devices_what_it_does_on_one(store, tmp_path):
    config = _config(optimizer="sgd", steps=2)
    transform = segmenter.Transform(_noisy, {"strength": np.float32(0.5)})
    given = {"transform": transform, "hosts": (1,)}
    one = _train(config, store, tmp_path / "one", **given)
    eight = _train(config, store, tmp_path / "eight", 8, data=8, **given)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, atol=2e-4, err_msg=name)


def test_a_checkpoint_of_another_network_is_refused(store, tmp_path):
    _train(_config(), store, tmp_path / "run")
    other = _config()
    other.model.widths = (8, 8)
    with pytest.raises(UserError, match="checkpoint of another network"):
        _train(other, store, tmp_path / "run")


def test_a_loss_that_is_no_number_ends_the_training(store, tmp_path):
    config = _config(learning_rate=1e30, clip=1e30, warmup=0.0, optimizer="sgd", steps=8)
    with pytest.raises(loop.Diverged, match="learning_rate"):
        _train(config, store, tmp_path / "run")


def test_the_job_trains_says_when_it_is_done_and_leaves_a_model(store, tmp_path, capsys):
    config = _config()
    config.data.store = str(store.url)
    config.mesh.data = 8
    assert segmenter.run(config, tmp_path / "job") == 0
    assert segmenter.run(config, tmp_path / "job") == 0
    assert "already finished" in capsys.readouterr().out
    apply, loaded = load_model(tmp_path / "job")
    assert apply(np.ones((1, 8, 8, 8, 1), np.float32)).shape == (1, 8, 8, 8, 3)
    assert loaded.training.steps == 4


def test_a_store_on_another_grid_is_refused(store, tmp_path):
    config = _config()
    config.data.store = str(store.url)
    config.preparation.spacing = (3.0, 3.0, 3.0)
    with pytest.raises(UserError, match="spacing"):
        segmenter.run(config, tmp_path / "job")


def test_missing_models_are_told(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoints"):
        load_model(tmp_path)


def test_fixed_parameters_are_left_alone_by_weight_decay(store, tmp_path):
    config = _config(
        optimizer="sgd", weight_decay=0.1, deep_supervision=False, batch_size=2, steps=2
    )
    config.model = {"name": "universal", "width": 2, "statistics": "sample"}
    before = models.functional(build_model(config, deep_supervision=False, seed=config.seed))[1]
    after = _train(config, store, tmp_path / "run")
    fixed = {"head.organ_embedding"} | {n for n in before if n.endswith((".mean", ".variance"))}
    for name, value in before.items():
        changed = np.any(after[name] != np.asarray(value))
        # What starts at 0 and gets no gradient stays 0; kernels do not.
        assert not changed if name in fixed else changed or not name.endswith(".kernel"), name
