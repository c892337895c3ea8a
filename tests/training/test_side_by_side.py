"""Cells that are trained in one step end as each would alone."""

import re

import jax
import numpy as np
import pytest

from configs.segmentation import get_config
from tumorjax import parallel
from tumorjax.clock import Clock
from tumorjax.files import read_csv
from tumorjax.training import loop, segmenter
from tumorjax.training.checkpoints import load_model
from tumorjax.volumes import open_store, write_case

SPACING = (4.0, 4.0, 4.0)


@pytest.fixture
def store(tmp_path, rng):
    url = tmp_path / "store"
    settings = {"spacing": list(SPACING), "window": [-175.0, 250.0]}
    for case in ("a", "b", "c"):
        image = rng.random((14, 12, 10), np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[3:9, 3:9, 3:9] = 5  # liver
        label[5:8, 5:8, 5:8] = 27  # liver_lesion
        write_case(url, case, image, label, SPACING, {"patient": case}, settings)
    return open_store(url)


def _config():
    config = get_config()
    config.model.widths = (4, 8)
    config.model.blocks = (1, 1)
    config.training.patch_size = (8, 8, 8)
    config.training.batch_size = 2
    config.training.steps = 4
    config.training.save_every = 2
    config.training.log_every = 1
    config.training.optimizer = "sgd"
    config.training.warmup = 0.0
    return config


def _trainings(store, folder):
    cases = {0: ["a"], 2: ["b", "c"], 3: ["c"]}
    return {
        place: segmenter.Training(place, [(store, c) for c in names], folder / f"cell{place}")
        for place, names in cases.items()
    }


@pytest.fixture
def mesh():
    return parallel.make_mesh({"cell": 4, "data": 2})


def test_each_cell_ends_as_it_would_alone(store, tmp_path, mesh):
    config = _config()
    alone = {}
    for place, training in _trainings(store, tmp_path / "alone").items():
        training.folder.mkdir(parents=True)
        one = config.copy_and_resolve_references()
        one.seed = training.seed
        on = parallel.split_cells(mesh)[place]
        alone[place] = segmenter.train_segmenter(
            one, training.sources, training.folder, on, clock=Clock()
        ).args[0]

    trainings = _trainings(store, tmp_path / "together")

    class Stopped(Exception):
        pass

    def stop(step, row):
        if step == 3:
            raise Stopped

    # The second begins at step 2, where it was stopped when it was trained alone.
    early = trainings[2]
    early.folder.mkdir(parents=True)
    one = config.copy_and_resolve_references()
    one.seed = early.seed
    with pytest.raises(Stopped):
        segmenter.train_segmenter(
            one,
            early.sources,
            early.folder,
            parallel.split_cells(mesh)[0],
            clock=Clock(),
            progress=stop,
        )
    for training in trainings.values():
        training.folder.mkdir(parents=True, exist_ok=True)
    trained, failed = segmenter.train_side_by_side(config, trainings, mesh, clock=Clock())
    assert not failed
    assert set(trained) == {0, 2, 3}
    for place, apply in trained.items():
        values = apply.args[0]
        on = {device for array in values.values() for device in array.devices()}
        assert on == set(parallel.split_cells(mesh)[place].devices.flat)
        for name, value in alone[place].items():
            np.testing.assert_allclose(values[name], value, atol=1e-6, err_msg=f"{place} {name}")
        # What lies in its folder is what a cell leaves that was trained alone.
        kept, settings = load_model(trainings[place].folder)
        assert settings.seed == place
        for name, value in values.items():
            np.testing.assert_array_equal(kept.args[0][name], value)
        curves = [
            read_csv(tmp_path / how / f"cell{place}" / "metrics.csv")
            for how in ("alone", "together")
        ]
        assert [row["step"] for row in curves[1]] == ["1", "2", "3", "4"]
        for a, b in zip(*curves, strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_a_cell_whose_loss_is_no_number_is_frozen_alone(store, tmp_path, mesh, rng):
    config = _config()
    stacked = segmenter.make_segmenter(config, mesh, stacked=True)
    places = parallel.split_cells(mesh)
    single = segmenter.make_segmenter(config, places[1])
    first = {p: segmenter.make_segmenter(config, places[p]).init(p) for p in range(4)}
    before = {p: jax.tree.map(np.asarray, state) for p, state in first.items()}
    batch = {
        "image": rng.random((4, 2, 8, 8, 8, 1), np.float32),
        "label": rng.integers(0, 3, (4, 2, 8, 8, 8)).astype(np.uint8),
    }
    batch["image"][2] = np.nan
    active = jax.device_put(np.array([True, True, True, False]), parallel.by_cell(mesh))
    state = parallel.stack_cells(mesh, first)
    state, scalars = stacked.step(state, parallel.put_batch(mesh, batch, stacked=True), active)
    found = parallel.cell_values(mesh, scalars)
    assert np.isnan(found[2]["loss"])
    after = {p: parallel.cell_state(mesh, state, p) for p in range(4)}
    for p in (2, 3):
        jax.tree.map(np.testing.assert_array_equal, after[p], before[p])
    mine = {name: values[1] for name, values in batch.items()}
    alone, _ = single.step(single.init(1), parallel.put_batch(places[1], mine))
    jax.tree.map(np.testing.assert_array_equal, after[1], alone)
    assert [int(after[p]["step"]) for p in range(4)] == [1, 1, 0, 0]
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(after[0]["optimizer"]),
            jax.tree.leaves(before[0]["optimizer"]),
            strict=True,
        )
    ]
    assert any(changed)


def test_a_cell_that_diverges_is_reported_and_the_others_end(store, tmp_path, mesh, monkeypatch):
    config = _config()
    trainings = _trainings(store, tmp_path)
    for training in trainings.values():
        training.folder.mkdir(parents=True)
    made = segmenter.crops.loader

    def loader(sources, *args, **kwargs):
        for number, batch in enumerate(made(sources, *args, **kwargs)):
            if sources[0][1] == "b" and number == 2:
                batch["image"] = np.full_like(batch["image"], np.nan)
            yield batch

    monkeypatch.setattr(segmenter.crops, "loader", loader)
    trained, failed = segmenter.train_side_by_side(config, trainings, mesh, clock=Clock())
    assert set(trained) == {0, 3}
    assert isinstance(failed[2], loop.Diverged)
    assert "cell2: the loss is nan at step 3" in str(failed[2])
    # What was good stays, to be looked into.
    _, settings = load_model(trainings[2].folder, step=2)
    assert settings.seed == 2


def test_a_step_of_cells_has_no_traffic_between_them(mesh):
    config = _config()
    stacked = segmenter.make_segmenter(config, mesh, stacked=True)
    one = segmenter.make_segmenter(config, parallel.split_cells(mesh)[0]).init(0)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), one)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 2, 8, 8, 8, 1), np.float32),
        "label": jax.ShapeDtypeStruct((4, 2, 8, 8, 8), np.uint8),
    }
    active = jax.ShapeDtypeStruct((4,), bool)
    text = stacked.step.lower(state, batch, active).compile().as_text()
    groups = re.findall(
        r"all-reduce(?:-start)?\(.*replica_groups=(\S+?)[,\s]*(?:use_|channel|$)", text
    )
    assert groups
    assert set(groups) <= {"{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[8]"}, groups
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
