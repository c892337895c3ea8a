"""Checkpoints: what is saved comes back, and what does not belong together is told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tumorjax import models, parallel
from tumorjax.errors import UserError
from tumorjax.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def _config(**model):
    settings = {"name": "resenc_unet", "widths": [2, 4], "blocks": [1, 1], "dtype": "float32"}
    classes = {"liver": ["liver"], "liver_lesion": ["liver_lesion"]}
    return ConfigDict({"model": settings | model, "task": {"classes": classes}})


def _state(seed, config=None):
    network = checkpoints.build_model(config or _config(), deep_supervision=False, seed=seed)
    parameters = models.functional(network)[1]
    return {"parameters": parameters, "step": jnp.asarray(seed, jnp.int32)}


def _write(folder, *steps):
    (folder / "config.json").write_text(json.dumps(_config().to_dict()))
    with checkpoints.open_manager(folder, keep=len(steps)) as manager:
        for step in steps:
            checkpoints.save(manager, step, _state(step), 10 * step)


def _assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_newest_state_comes_back_with_its_position_on_any_mesh(tmp_path):
    _write(tmp_path, 1, 2)
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2})
    blank = jax.tree.map(jnp.zeros_like, _state(0))
    like = jax.device_put(blank, parallel.state_shardings(mesh, blank))
    with checkpoints.open_manager(tmp_path) as manager:
        state, position = checkpoints.restore_newest(manager, like)
    assert (int(state["step"]), position) == (2, 20)
    _assert_equal(state["parameters"], _state(2)["parameters"])
    kernel = state["parameters"]["encoder.1.blocks.0.conv2.conv.kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, 3, 4, 2)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        assert checkpoints.restore_newest(manager, _state(0)) is None


def test_as_many_checkpoints_stay_as_asked_for(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        for step in (1, 2, 3):
            checkpoints.save(manager, step, _state(step), step)
        checkpoints.finish(manager)
        assert list(manager.all_steps()) == [2, 3]


def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, rng):
    _write(tmp_path, 1, 2)
    x = jnp.asarray(rng.standard_normal((1, 4, 4, 4, 1)), jnp.float32)
    for step, seed in ((None, 2), (1, 1)):
        apply, config = checkpoints.load_model(tmp_path, step)
        network = checkpoints.build_model(_config(), deep_supervision=False, seed=seed)
        np.testing.assert_allclose(apply(x), network(x), atol=1e-5)
        _assert_equal(apply.args[0], models.functional(network)[1])
    assert list(config.task.classes) == ["liver", "liver_lesion"]
    with pytest.raises(UserError, match="no checkpoint 7"):
        checkpoints.load_model(tmp_path, 7)


def test_a_checkpoint_of_another_network_is_told(tmp_path):
    _write(tmp_path, 1)
    other = _config(widths=[2, 6])
    with (
        checkpoints.open_manager(tmp_path) as manager,
        pytest.raises(UserError, match=r"another network .* 4 in the checkpoint, 6 in the config"),
    ):
        checkpoints.restore_newest(manager, _state(0, other))
    (tmp_path / "config.json").write_text(json.dumps(_config(blocks=[1, 2]).to_dict()))
    with pytest.raises(UserError, match="missing in the checkpoint"):
        checkpoints.load_model(tmp_path)


def test_folders_without_a_model_are_told(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        checkpoints.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(UserError, match=r"config\.json: not readable"):
        checkpoints.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_config().to_dict()))
    with pytest.raises(UserError, match="no checkpoints"):
        checkpoints.load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="Train first"):
        checkpoints.load_model(tmp_path)


def test_shapes_of_a_network_need_no_weights():
    apply, abstract = checkpoints.abstract_model(_config())
    parameters = _state(0)["parameters"]
    assert {n: (v.shape, v.dtype) for n, v in abstract.items()} == {
        n: (v.shape, v.dtype) for n, v in parameters.items()
    }
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 4, 1)), jnp.float32)
    assert apply(parameters, x).shape == (1, 4, 4, 4, 3)


def test_a_network_with_more_heads_in_training_gives_its_finest_logits(tmp_path, rng):
    config = _config()
    settings = {"variant": "segresnet_ds", "init_filters": 4, "blocks_down": [1, 1, 1]}
    config.model = {"name": "segresnet", "dtype": "float32"} | settings
    config.training = {"deep_supervision": True}
    network = checkpoints.build_model(config, deep_supervision=True, seed=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    parameters = models.functional(network)[1]
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, 1, {"parameters": parameters}, 0)
        manager.wait_until_finished()
    apply, _ = checkpoints.load_model(tmp_path)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 8, 1)), jnp.float32)
    levels = jax.jit(lambda x: network(x))(x)
    assert len(levels) == 2
    np.testing.assert_allclose(jax.jit(apply)(x), levels[0], atol=1e-5)


def test_what_a_killed_save_left_aside_is_gone_before_the_next_one(tmp_path):
    _write(tmp_path, 1)
    aside = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    (aside / "d").mkdir(parents=True)
    (aside / "d" / "part").write_bytes(b"half")
    checkpoints.load_model(tmp_path)
    assert aside.exists(), "a reader leaves alone what a training may be writing"
    with checkpoints.open_manager(tmp_path, write=True) as manager:
        assert not aside.exists()
        assert manager.latest_step() == 1
        checkpoints.save(manager, 2, _state(2), 20)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def _largest(path):
    return max(path.rglob("d/*"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: os.truncate(_largest(path), 100), "not readable"),
        (lambda path: _largest(path).unlink(), "its file is missing"),
        (lambda path: shutil.rmtree(path / "state" / "ocdbt.process_0"), "its file is missing"),
        (lambda path: shutil.rmtree(path / "state"), "state/_METADATA is missing"),
        (lambda path: (path / "state" / "manifest.ocdbt").write_bytes(b"x"), "not readable"),
        (lambda path: (path / "loader" / "metadata").write_text("{"), "not readable"),
        (lambda path: (shutil.rmtree(path), path.mkdir()), "loader/metadata is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_its_step_saved_anew(tmp_path, caplog, harm, words):
    _write(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    assert checkpoints.damage(folder / "2") is None
    harm(folder / "2")
    with checkpoints.open_manager(tmp_path, write=True) as manager:
        state, position = checkpoints.restore_newest(manager, _state(0))
        assert (int(state["step"]), position) == (1, 10)
        _assert_equal(state["parameters"], _state(1)["parameters"])
        assert words in caplog.text
        assert f"{folder / '2'} is damaged and passed over" in caplog.text
        checkpoints.save(manager, 2, _state(2), 20)
    assert checkpoints.steps(tmp_path) == [1, 2]
    _assert_equal(checkpoints.load_model(tmp_path)[0].args[0], _state(2)["parameters"])
    assert (folder / "damaged-2").is_dir()


def test_a_network_whose_checkpoint_is_damaged_is_not_taken_from_an_older_one(tmp_path):
    _write(tmp_path, 1, 2)
    _largest(tmp_path / "checkpoints" / "2").unlink()
    with pytest.raises(UserError, match=r"2: damaged, .* or use another step \(1\)"):
        checkpoints.load_model(tmp_path)
    _assert_equal(checkpoints.load_model(tmp_path, 1)[0].args[0], _state(1)["parameters"])


# In a user namespace of its own, where it may mount a disk of a megabyte.
FULL_DISK = """
mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" - "$1" <<'END'
import sys
from pathlib import Path
import numpy as np
import jax.numpy as jnp
from tumorjax.errors import UserError
from tumorjax.training import checkpoints

folder = Path(sys.argv[1])
kernel = np.random.default_rng(0).random(110_000, np.float32)

def state(step):
    return {"parameters": {"kernel": jnp.asarray(step * kernel)}, "step": jnp.asarray(step)}

try:
    with checkpoints.open_manager(folder, write=True) as manager:
        for step in (1, 2, 3):
            checkpoints.save(manager, step, state(step), step)
            checkpoints.finish(manager)
except UserError as error:
    print(error)
with checkpoints.open_manager(folder, write=True) as manager:
    restored, position = checkpoints.restore_newest(manager, state(0))
assert position == 2
assert (restored["parameters"]["kernel"] == state(2)["parameters"]["kernel"]).all()
print("restored", position)
END
"""


def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a disk")
    result = subprocess.run(
        [*namespace, "sh", "-c", FULL_DISK, "sh", tmp_path, sys.executable],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    told, restored = result.stdout.strip().splitlines()[-2:]
    assert told == (
        f"{tmp_path / 'checkpoints'}: the disk is full, and a checkpoint could not be written. That"
        " of step 2 is whole. Free some space and run the same command again"
    )
    assert restored == "restored 2"
