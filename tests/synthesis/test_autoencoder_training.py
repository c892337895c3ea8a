"""Training the autoencoder: the same on two devices as on one, and the same stopped or not."""

import json

import jax
import numpy as np
import pytest

from configs.autoencoder import get_config
from configs.segmentation import get_config as segmentation_config
from tumorjax import parallel
from tumorjax.clock import Clock
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.synthesis import autoencoder_training, discriminators
from tumorjax.synthesis.autoencoder_step import make_trainer
from tumorjax.synthesis.autoencoder_training import run, split_patients, train
from tumorjax.synthesis.trained_autoencoder import load
from tumorjax.training import segmenter
from tumorjax.training.checkpoints import open_manager
from tumorjax.volumes import create_store, open_store, write_case

SPACING = (4.0, 4.0, 4.0)
WINDOW = [-175.0, 250.0]


@pytest.fixture
def store(tmp_path, rng):
    url = tmp_path / "store"
    settings = {"spacing": list(SPACING), "window": WINDOW}
    for case in ("a", "b", "c", "d"):
        image = rng.random((20, 18, 16), np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[4:12, 4:12, 4:12] = 5  # liver
        label[6:9, 6:9, 6:9] = 27  # liver_lesion
        image[label == 27] *= 0.3
        write_case(url, case, image, label, SPACING, {"patient": f"patient_{case}"}, settings)
    return open_store(url)


@pytest.fixture(autouse=True)
def narrow_discriminators(monkeypatch):
    whole = discriminators.create

    def narrow(dimensions, **options):
        return whole(dimensions, width=4, layers=2, **options)

    monkeypatch.setattr(discriminators, "create", narrow)


def _config(kind="kl", **training):
    config = get_config()
    config.model.kind = kind
    config.model.widths = (4, 8)
    config.model.latent_channels = 3
    config.model.decoder_blocks = (1,)
    config.mesh.data = 8
    config.training.codes = 8
    config.training.patch_size = (12, 12, 12)
    config.training.batch_size = 8
    config.training.steps = 4
    config.training.save_every = 2
    config.training.log_every = 1
    config.evaluation.batches = 2
    for name, value in training.items():
        config.training[name] = value
    return config


def _train(config, store, folder, progress=lambda step, row: None):
    folder.mkdir(parents=True, exist_ok=True)
    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])
    sources = [(store, case) for case in store.cases]
    state = train(config, sources, folder, mesh, clock=Clock(), progress=progress)
    return jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_two_devices_make_the_same_step_as_one(rng, kind):
    config = _config(kind, adversarial_from=1, optimizer="sgd", learning_rate=0.1)
    batch = {"image": rng.random((4, 12, 12, 12, 1), np.float32)}

    def steps(devices):
        mesh = parallel.make_mesh({"data": devices}, jax.devices()[:devices])
        trainer = make_trainer(config, mesh)
        state = trainer.init(3)
        for _ in range(2):
            state, scalars = trainer.step(state, parallel.put_batch(mesh, batch))
        return jax.tree.map(np.asarray, (state, scalars))

    one, two = steps(1), steps(2)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True)
    for (path, value), found in pairs:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, value, atol=2e-4, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "training"), [("kl", {}), ("vq", {"adversarial_from": 2, "optimizer": "adam"})]
)
def test_continued_training_ends_with_the_same_bits(store, tmp_path, kind, training):
    config = _config(kind, **training)
    whole = _train(config, store, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step, row):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        _train(config, store, tmp_path / "stopped", kill)
    with open_manager(tmp_path / "stopped") as manager:
        assert manager.latest_step() == 2
    continued = _train(config, store, tmp_path / "stopped")
    assert set(continued) == set(whole)
    jax.tree.map(np.testing.assert_array_equal, continued, whole)
    assert [r["step"] for r in read_csv(tmp_path / "stopped/metrics.csv")] == ["1", "2", "3", "4"]


def test_discriminators_wait_for_their_step(store, tmp_path):
    _train(_config(adversarial_from=2), store, tmp_path)
    scores = [float(row["discriminator"]) for row in read_csv(tmp_path / "metrics.csv")]
    assert scores[:2] == [0, 0]
    assert min(scores[2:]) > 0


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_job_trains_and_leaves_an_autoencoder_that_loads(store, tmp_path, capsys, rng, kind):
    config = _config(kind, steps=2)
    config.data.store = str(store.url)
    config.data.held_out = 0.25
    folder = tmp_path / "job"
    assert run(config, folder) == 0
    assert run(config, folder) == 0
    assert "already finished" in capsys.readouterr().out
    trained = load(folder)
    assert (trained.spacing, trained.window, trained.factor) == (SPACING, tuple(WINDOW), 4)
    x = rng.random((2, 12, 8, 12, 1), np.float32) * 2 - 1
    z = jax.jit(lambda encode, x: encode(x))(trained.encode, x)
    assert z.shape == (2, 3, 2, 3, trained.latent_channels)
    y = np.asarray(jax.jit(lambda decode, z: decode(z))(trained.decode, z))
    assert y.shape == x.shape
    assert np.abs(y).max() <= 1
    # Partials of one architecture are one to the compiler.
    assert jax.tree.structure(load(folder).encode) == jax.tree.structure(trained.encode)
    assert len(trained.trained_on["patients"]) == 3
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["held_out_scans"] == 1
    assert quality["crops"] == 16
    assert set(quality["hu_error"]) >= {"fat", "organ", "tumor"}
    assert (folder / "quality.png").stat().st_size > 1000


def test_latents_have_unit_variance(store, tmp_path):
    config = _config(steps=2)
    config.data.store = str(store.url)
    config.evaluation.batches = 16
    run(config, tmp_path)
    trained = load(tmp_path)
    crops = np.stack([store.read(c, "image", (slice(16),) * 3) for c in store.cases])
    z = np.asarray(trained.encode(crops[..., None] * 2 - 1))
    np.testing.assert_allclose(z.std(axis=(0, 1, 2, 3)), 1, atol=0.4)


def test_codes_bound_the_latents_that_are_decoded(store, tmp_path, rng):
    config = _config("vq", steps=3)
    config.data.store = str(store.url)
    run(config, tmp_path)
    trained = load(tmp_path)
    (given,) = trained.decode.args
    codes = np.asarray(given["codebook"]["embeddings"])
    scaled = (codes - given["latent"]["shift"]) / given["latent"]["scale"]
    assert scaled.min() == pytest.approx(-1, abs=1e-5)
    assert scaled.max() == pytest.approx(1, abs=1e-5)
    # A small error of the latents is undone by the codes.
    z = scaled[rng.integers(len(codes), size=(1, 2, 2, 2))]
    gaps = np.sort(np.linalg.norm(codes[:, None] - codes, axis=-1), axis=1)[:, 1]
    nudge = rng.uniform(-0.2, 0.2, z.shape) * gaps[gaps > 0].min() / 3**0.5
    noisy = z + (nudge / np.asarray(given["latent"]["scale"])).astype(np.float32)
    np.testing.assert_allclose(trained.decode(noisy), trained.decode(z), atol=1e-5)


def test_patients_are_on_one_side(store):
    sources = [(store, case) for case in store.cases] + [(store, "a")]
    training, held_out = split_patients(sources, 0.5, seed=1)
    sides = [{s.record(c)["patient"] for s, c in side} for side in (training, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2
    assert len(training) + len(held_out) == 5


def test_a_loss_that_is_no_number_ends_the_training(store, tmp_path):
    config = _config(optimizer="sgd", learning_rate=1e30, clip=1e30, warmup=0.0, steps=8)
    with pytest.raises(UserError, match=r"at step \d+.*There is no checkpoint from before"):
        _train(config, store, tmp_path / "early")
    config = _config(steps=2)
    _train(config, store, tmp_path / "late")
    config = _config(optimizer="adamw", learning_rate=1e30, clip=1e30, steps=8)
    with pytest.raises(UserError, match=r"last good checkpoint is .*checkpoints/2"):
        _train(config, store, tmp_path / "late")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.store": ""}, "data.root is empty"),
        ({"data.held_out": 1.0}, "held_out is 1.0"),
        ({"data.held_out": 0.95}, "4 are to be held out"),
        ({"preparation.spacing": (3.0, 3.0, 3.0)}, "spacing"),
        ({"preparation.window": (-100.0, 250.0)}, "window"),
        ({"model.preset": "huge"}, "preset"),
        ({"training.patch_size": (12, 12, 10)}, "multiples of 4"),
        ({"training.kl": -1.0}, "training.kl"),
        ({"training.optimizer": "lion"}, "adam"),
        ({"training.schedule": "never"}, "drops"),
        ({"training.perceptual": "nowhere"}, "has seen is not known"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(store, tmp_path, change, message):
    config = _config()
    config.data.source = "nnunet"
    with config.unlocked():
        config.update_from_flattened_dict({"data.store": str(store.url)} | change)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "job")
    assert not (tmp_path / "job" / "checkpoints").exists()


def test_a_store_without_scans_is_told(tmp_path):
    create_store(tmp_path / "empty", {"spacing": list(SPACING), "window": WINDOW})
    config = _config()
    config.data.store = str(tmp_path / "empty")
    with pytest.raises(UserError, match="no scans"):
        run(config, tmp_path / "job")


def test_scans_of_an_earlier_run_are_not_forgotten(store, tmp_path, rng):
    config = _config(steps=2)
    config.data.store, config.data.held_out = str(store.url), 0.0
    run(config, tmp_path / "job")
    image = rng.random((16, 16, 16), np.float32)
    settings = {"spacing": list(SPACING), "window": WINDOW}
    label = np.zeros(image.shape, np.uint8)
    write_case(tmp_path / "new", "e", image, label, SPACING, {"patient": "patient_e"}, settings)
    config.data.store, config.training.steps = str(tmp_path / "new"), 4
    run(config, tmp_path / "job")
    seen = load(tmp_path / "job").trained_on["patients"]
    assert seen == [f"patient_{name}" for name in "abcde"]


def test_scans_of_the_perceptual_network_count_as_seen(store, tmp_path, rng):
    network = segmentation_config()
    network.model.widths, network.model.blocks = (4, 8), (1, 1)
    network.training.patch_size, network.training.batch_size = (8, 8, 8), 2
    network.training.steps = 1
    (tmp_path / "network").mkdir()
    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])
    segmenter.train_segmenter(network, [(store, "a")], tmp_path / "network", mesh, clock=Clock())
    config = _config(steps=2, perceptual=str(tmp_path / "network"))
    folder = tmp_path / "job"
    state = _train(config, store, folder)
    assert np.isfinite(state["parameters"]["decoder.head.conv.kernel"]).all()
    assert float(read_csv(folder / "metrics.csv")[0]["perceptual"]) > 0
    sources = [(store, "b")]
    record = autoencoder_training._trained_on(config, sources, tmp_path / "other")
    assert record["patients"] == ["patient_a", "patient_b"]


def test_unfinished_folders_do_not_load(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)


def test_crops_lie_on_organs_only_where_the_config_says_so(store):
    sources = [(store, "a")]
    config = _config(centered=0.0)
    with autoencoder_training._loader(sources, config.training, 0) as batches:
        corners = [next(batches)["label"][:, 0, 0, 0] for _ in range(20)]
    assert 0 < np.mean(np.concatenate(corners) > 0) < 1
