"""Training the denoiser: the same on two devices, stopped and continued; what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import autoencoder as autoencoder_config
from configs.diffusion import get_config
from tumorjax import parallel
from tumorjax.clock import Clock
from tumorjax.data.seen import digest
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.synthesis import (
    autoencoder_training,
    denoisers,
    diffusion_training,
    lesion_crops,
    trained_diffusion,
)
from tumorjax.synthesis.even_convolution import fold
from tumorjax.synthesis.trained_autoencoder import TrainedAutoencoder
from tumorjax.training import loop
from tumorjax.training.checkpoints import open_manager
from tumorjax.volumes import open_store, write_case

SPACING = (4.0, 4.0, 4.0)
WINDOW = (-175.0, 250.0)
CHANNELS = 4


def _write(url, rng, case, tumor=27, host=5, spacing=SPACING, patient=None):
    """A scan with two tumours in one organ, or with none (tumor=0)."""
    settings = {"spacing": list(spacing), "window": list(WINDOW)}
    image = (0.5 + 0.1 * rng.standard_normal((28, 24, 24))).clip(0, 1).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[3:25, 3:21, 3:21] = host
    if tumor:
        label[6:10, 8:12, 8:11] = tumor
        label[18:20, 14:16, 14:16] = tumor
        image[label == tumor] *= 0.4
    meta = {"patient": patient or case}
    write_case(url, case, image, label, spacing, meta, settings)


@pytest.fixture
def store(tmp_path, rng):
    url = tmp_path / "store"
    for case in "abc":
        _write(url, rng, case)
    for case in "def":
        _write(url, rng, case, tumor=29, host=3)
    _write(url, rng, "healthy", tumor=0)
    return open_store(url)


@pytest.fixture(scope="session")
def autoencoder():
    """Latents that are projections of blocks of 4^3 voxels: exact to decode, and no training."""
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0][:, :CHANNELS]
    basis = jnp.asarray(basis, jnp.float32)

    def decode(basis, z):
        b, x, y, z_size, _ = z.shape
        blocks = (z @ basis.T).reshape(b, x, y, z_size, 4, 4, 4)
        return blocks.transpose(0, 1, 4, 2, 5, 3, 6).reshape(b, 4 * x, 4 * y, 4 * z_size, 1)

    return TrainedAutoencoder(
        jax.tree_util.Partial(lambda basis, x: fold(x, 4) @ basis, basis),
        jax.tree_util.Partial(decode, basis),
        CHANNELS,
        4,
        0,
        SPACING,
        WINDOW,
        None,
        {"patients": ["seen_before"], "images": ["00"], "scans": 1},
    )


def _config(**training):
    config = get_config()
    config.model.widths = (8, 16)
    config.training.crop = (16, 16, 16)
    config.training.batch_size = 4
    config.training.steps = 4
    config.training.save_every = 2
    config.training.log_every = 1
    config.quality.tumors = 2
    for name, value in training.items():
        config.training[name] = value
    return config


def _train(config, store, autoencoder, folder, devices=1):
    folder.mkdir(parents=True, exist_ok=True)
    mesh = parallel.make_mesh({"data": devices}, jax.devices()[:devices])
    sources = [(store, case) for case in store.cases]
    state, _ = diffusion_training.train(
        config, sources, ("liver", "kidney"), autoencoder, folder, mesh, clock=Clock()
    )
    return jax.tree.map(np.asarray, state)


def test_two_devices_train_as_one_does(store, autoencoder, tmp_path, monkeypatch):
    # Adam divides by a gradient's size: where that is rounding alone it makes steps of it.
    monkeypatch.setattr(diffusion_training, "optimizer", lambda training: optax.sgd(0.1))
    diffusion_training._make_trainer.cache_clear()
    config = _config()
    one = _train(config, store, autoencoder, tmp_path / "one")
    two = _train(config, store, autoencoder, tmp_path / "two", devices=2)
    for name, value in one["ema"].items():
        np.testing.assert_allclose(two["ema"][name], value, atol=1e-4, err_msg=name)
    curves = [read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    for a, b in zip(*curves, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)
    diffusion_training._make_trainer.cache_clear()


def test_continued_training_ends_with_the_same_bits(store, autoencoder, tmp_path, monkeypatch):
    whole = _train(_config(), store, autoencoder, tmp_path / "whole")

    class Killed(Exception):
        pass

    save = loop.checkpoints.save

    def kill(manager, step, state, position):
        save(manager, step, state, position)
        manager.wait_until_finished()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoints, "save", kill)
        with pytest.raises(Killed):
            _train(_config(), store, autoencoder, tmp_path / "stopped")
    with open_manager(tmp_path / "stopped") as manager:
        assert manager.latest_step() == 2
    continued = _train(_config(), store, autoencoder, tmp_path / "stopped")
    for part in ("parameters", "ema"):
        for name, value in whole[part].items():
            np.testing.assert_array_equal(continued[part][name], value, err_msg=name)


def test_a_loss_that_is_no_number_names_the_step_and_the_last_checkpoint(
    store, autoencoder, tmp_path, monkeypatch
):
    step = diffusion_training.loss_function

    def broken(key, denoise, encode, batch, settings, training):
        loss = step(key, denoise, encode, batch, settings, training)
        # NaN once the weights have moved for two steps.
        moved = batch["radius_mm"].sum() * 0 + broken_after[0]
        return loss * jnp.where(moved > 0, jnp.nan, 1.0)

    broken_after = [0]
    folder = tmp_path / "run"
    _train(_config(steps=2), store, autoencoder, folder)
    broken_after[0] = 1
    monkeypatch.setattr(diffusion_training, "loss_function", broken)
    diffusion_training._make_trainer.cache_clear()
    with pytest.raises(UserError, match=r"nan at step 3.*checkpoints/2"):
        _train(_config(), store, autoencoder, folder)
    diffusion_training._make_trainer.cache_clear()


def test_the_average_of_the_weights_is_the_closed_form(rng):
    values = rng.standard_normal((6, 3)).astype(np.float32)
    average, wanted = {"w": jnp.zeros(3)}, np.zeros(3)
    for step, value in enumerate(values):
        average = diffusion_training.moving_average(
            average, {"w": jnp.asarray(value)}, jnp.asarray(step), 0.3
        )
        kept = min(0.3, (1 + step) / (10 + step))
        wanted = kept * wanted + (1 - kept) * value
    np.testing.assert_allclose(average["w"], wanted, rtol=1e-5)


def test_so_many_conditions_are_dropped():
    told = np.asarray(diffusion_training.told(jax.random.key(0), 20000, 0.1))
    assert 1 - told.mean() == pytest.approx(0.1, abs=0.01)
    assert diffusion_training.told(jax.random.key(0), 100, 0.0).all()


def test_image_and_mask_are_mirrored_together(rng):
    mask = rng.random((64, 4, 4, 4)) < 0.3
    image = jnp.asarray(mask[..., None] * 2.0 - 1)
    mirrored = jax.jit(diffusion_training.mirrored, static_argnums=3)
    x, m = mirrored(jax.random.key(1), image, jnp.asarray(mask), (0, 2))
    np.testing.assert_array_equal(np.asarray(x)[..., 0] > 0, m)
    kinds = [mask, mask[:, ::-1], mask[:, :, :, ::-1], mask[:, ::-1, :, ::-1]]
    shares = [(np.asarray(m) == kind).all(axis=(1, 2, 3)).mean() for kind in kinds]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert all(share > 0.1 for share in shares)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_batches_move_the_weights_as_one_of_their_mean(rng, accumulation):
    config = _config(accumulation=accumulation, schedule="constant", clip=1e6)
    gradients = rng.standard_normal((accumulation, 5)).astype(np.float32)
    update = diffusion_training.optimizer(config.training)
    state = update.init(jnp.zeros(5))
    for gradient in gradients:
        change, state = update.update(jnp.asarray(gradient), state, jnp.zeros(5))
    # Adam's first step is the learning rate along the sign of the gradient.
    rate = config.training.learning_rate
    np.testing.assert_allclose(change, -rate * np.sign(gradients.mean(0)), rtol=1e-3)


# ---------------------------------------------------------------------------- crops


def test_crops_have_one_tumour_in_their_mask_and_all_in_their_image(store):
    lesions = lesion_crops.find_lesions([(store, case) for case in store.cases])
    assert len(lesions) == 12
    organs = lesion_crops.organs_of(lesions)
    assert organs == ("liver", "kidney")
    with lesion_crops.loader(lesions, organs, (24, 24, 24), 8, 0.1, 3) as batches:
        some = [next(batches) for _ in range(6)]
    counts = {int(mask.sum()) for batch in some for mask in batch["mask"]}
    assert counts == {4 * 4 * 3, 2 * 2 * 2}
    for batch in some:
        for image, mask, radius in zip(
            batch["image"][..., 0], batch["mask"], batch["radius_mm"], strict=True
        ):
            assert radius == pytest.approx((mask.sum() * 64 * 3 / 4 / np.pi) ** (1 / 3), rel=1e-3)
            # The other tumour is as dark, and not in the mask.
            assert image[mask].mean() < 0.3
            assert ((image < 0.28) & (image > 0.05)).sum() > mask.sum()
    drawn = np.concatenate([batch["organ"] for batch in some])
    assert 0.25 < drawn.mean() < 0.75


def test_processes_share_a_batch_and_any_of_them_can_be_made_anew(store):
    lesions = lesion_crops.find_lesions([(store, case) for case in store.cases])

    def batch(start, **options):
        with lesion_crops.loader(
            lesions, ("liver", "kidney"), (8, 8, 8), 4, 0.2, 1, start=start, **options
        ) as batches:
            return next(batches)

    whole = batch(5)
    halves = [batch(5, process_index=i, process_count=2) for i in (0, 1)]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), value)
    assert not np.array_equal(batch(6)["image"], whole["image"])


def test_organs_without_tumours_are_refused(store):
    lesions = lesion_crops.find_lesions([(store, case) for case in store.cases])
    with pytest.raises(UserError, match="no tumours of the pancreas"):
        lesion_crops.loader(lesions, ("pancreas",), (8, 8, 8), 4, 0.2)


# ---------------------------------------------------------------------------- generation


@pytest.fixture(scope="session")
def generator(autoencoder):
    config = _config()
    apply, parameters = denoisers.functional(config.model, CHANNELS, 2)
    rng = np.random.default_rng(2)
    parameters = {
        name: value + 0.1 * jnp.asarray(rng.standard_normal(value.shape), jnp.float32)
        for name, value in parameters.items()
    }

    def make(**settings):
        return jax.jit(
            trained_diffusion.make_generate(
                config.diffusion,
                jax.tree_util.Partial(apply, parameters),
                autoencoder.encode,
                autoencoder.decode,
                CHANNELS,
                **settings,
            )
        )

    return make


def _scans(rng, rows=3):
    image = rng.uniform(-0.5, 0.5, (rows, 16, 16, 16, 1)).astype(np.float32)
    mask = np.zeros((rows, 16, 16, 16), bool)
    mask[:, 1:3, 1:3, 1:3] = True
    organ = np.asarray([0, 1, 0][:rows], np.int32)
    return image, mask, organ, np.full(rows, 5.0, np.float32)


def test_only_what_a_tumour_touches_changes(generator, autoencoder, rng):
    given = _scans(rng)
    with_tumor, without = generator()(jax.random.key(0), *given)
    np.testing.assert_allclose(without, autoencoder.decode(autoencoder.encode(given[0])), atol=1e-5)
    changed = np.abs(with_tumor - without).max(axis=(0, 4)) > 1e-6
    # The hole lies in latent 0; its neighbours end at voxel 8.
    assert changed[:4, :4, :4].any()
    changed[:8, :8, :8] = False
    assert not changed.any()


def test_a_key_gives_one_tumour_and_each_row_its_own(generator, rng):
    image, mask, organ, radius = (np.repeat(value[:1], 3, axis=0) for value in _scans(rng))
    generate = generator()
    first, _ = generate(jax.random.key(0), image, mask, organ, radius)
    again, _ = generate(jax.random.key(0), image, mask, organ, radius)
    other, _ = generate(jax.random.key(1), image, mask, organ, radius)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert np.abs(first[0] - first[1]).max() > 1e-2


def test_guidance_strengthens_what_organ_and_radius_do(generator, rng):
    image, mask, _, radius = _scans(rng)

    def distance(strength):
        generate = generator(guidance=strength)
        a, _ = generate(jax.random.key(0), image, mask, np.zeros(3, np.int32), radius)
        b, _ = generate(jax.random.key(0), image, mask, np.ones(3, np.int32), radius)
        return float(np.abs(a - b).mean())

    assert distance(0.0) == pytest.approx(0, abs=1e-6)
    assert distance(3.0) > 1.5 * distance(1.0) > 0


# ---------------------------------------------------------------------------- the job


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
    """A tiny autoencoder of the job, hardly trained."""
    folder = tmp_path_factory.mktemp("stage1")
    rng = np.random.default_rng(7)
    for case in "xyz":
        _write(folder / "scans", rng, case)
    config = autoencoder_config.get_config()
    config.data.store = str(folder / "scans")
    config.model.widths, config.model.decoder_blocks = (4, 8, 8), (1, 1)
    config.model.latent_channels = CHANNELS
    config.training.patch_size = (16, 16, 16)
    config.training.batch_size = 8
    config.training.steps = 2
    config.evaluation.batches = 1
    assert autoencoder_training.run(config, folder / "job") == 0
    return folder / "job"


def test_the_job_trains_and_leaves_a_synthesizer(store, trained_folder, tmp_path, capsys, rng):
    config = _config(steps=2)
    config.training.batch_size = 8  # a row for each of the tests' devices
    config.data.store = str(store.url)
    config.data.held_out = 0.3
    config.autoencoder = str(trained_folder)
    folder = tmp_path / "job"
    assert diffusion_training.run(config, folder) == 0
    assert diffusion_training.run(config, folder) == 0
    assert "already finished" in capsys.readouterr().out
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["tumors"] > 0
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")

    trained = trained_diffusion.load(folder, steps=2)
    assert trained.organs == ("liver", "kidney")
    assert (trained.spacing, trained.window, trained.crop) == (SPACING, WINDOW, (16, 16, 16))
    with_tumor, without = jax.jit(trained.generate)(jax.random.key(0), *_scans(rng))
    assert with_tumor.shape == without.shape == (3, 16, 16, 16, 1)
    # Both networks' patients, without those that were held out.
    seen = set(trained.trained_on["patients"])
    assert len(seen & {digest(patient) for patient in "xyz"}) == 2
    assert len(seen & {digest(patient) for patient in "abcdef"}) == 4
    assert digest("healthy") not in seen

    with pytest.raises(UserError, match="does not suit"):
        trained_diffusion.load(folder, sampler="ddim")
    config.training.learning_rate = 0.5
    with pytest.raises(UserError, match=r"other settings: config\.training\.learning_rate"):
        diffusion_training.run(config, folder)


def test_wrong_input_is_refused_before_anything_trains(store, trained_folder, tmp_path, rng):
    def refused(said, **changes):
        config = _config()
        config.data.store = str(store.url)
        config.autoencoder = str(trained_folder)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                config[section][name] = value
            else:
                config[section] = value
        with pytest.raises(UserError, match=said):
            diffusion_training.run(config, tmp_path / f"refused{len(changes)}{said[:5]}")

    refused("autoencoder is empty", autoencoder="")
    refused('job "autoencoder"', autoencoder=str(tmp_path / "nowhere"))
    refused("data.organs has heart", data__organs=("heart",))
    refused("no tumours of pancreas", data__organs=("pancreas",))
    refused("multiples of 4", training__crop=(18, 16, 16))
    refused("l1 or l2", training__loss="huber")
    refused("does not suit", diffusion__sampler="ddim")
    refused("time_distribution", diffusion__time_distribution="cubic")
    refused("condition_dropout", training__condition_dropout=1.5)

    healthy = tmp_path / "healthy"
    _write(healthy, rng, "h", tumor=0)
    refused("annotated tumours", data__store=str(healthy))
    coarse = tmp_path / "coarse"
    _write(coarse, rng, "c", spacing=(5.0, 5.0, 5.0))
    refused(
        r"the autoencoder was trained with \[4.0, 4.0, 4.0\]",
        data__store=str(coarse),
        preparation__spacing=(5.0, 5.0, 5.0),
    )


def test_a_folder_without_a_synthesizer_is_refused(trained_folder, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        trained_diffusion.load(tmp_path)
    with pytest.raises(UserError, match="no workdir of a diffusion job"):
        trained_diffusion.load(trained_folder)
