import json

import pytest

from configs import scaling, segmentation
from tumorjax.errors import UserError
from tumorjax.rehearsal import rehearse


def small():
    config = scaling.get_config("virtual")
    config.model.widths, config.model.blocks = (4, 8), (1, 1)
    config.training.patch_size = (16, 16, 16)
    config.rehearse = "v5e:2x2"
    return config


def test_an_efficiency_that_is_none_is_refused(tmp_path):
    config = small()
    config.rehearsal.efficiency = 1.5
    with pytest.raises(UserError, match=r"efficiency is 1\.5"):
        rehearse.run(config, tmp_path)


@pytest.mark.slow
def test_cells_side_by_side_on_four_chips_say_nothing_to_each_other(tmp_path):
    pytest.importorskip("libtpu")
    config = small()
    config.rehearsal.prices.v5e = 2.0
    assert rehearse.run(config, tmp_path) == 0
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert (found["chips"], found["mesh"]["cell"], found["sent"]) == (4, 4, 0)
    assert found["collectives"] == {}
    assert found["gathered_activations"] == []
    grid = found["grid"]["at_best"]
    # Eight cells of the default study.
    assert (grid["waves"], grid["idle"]) == (2, 0)
    assert grid["chip_hours"] == pytest.approx(4 * grid["hours"])
    assert found["price"]["at_best"] == pytest.approx(2.0 * grid["chip_hours"])
    # Parameters and momenta of AdamW, three arrays of float32 a weight, and the batch.
    assert found["memory"]["arguments"] >= 3 * 4 * found["parameters"]
    assert found["memory"]["peak"] >= found["memory"]["arguments"]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["cell", "data"])
def test_a_chip_has_as_much_to_do_when_the_job_grows_with_the_chips(tmp_path, axis):
    pytest.importorskip("libtpu")
    config = small() if axis == "cell" else segmentation.get_config("virtual")
    config.model.widths, config.model.blocks = (4, 8), (1, 1)
    config.training.patch_size = (16, 16, 16)
    config.rehearse = "v5e:8x8"
    config.mesh.update({"cell": 32, "data": 2} if axis == "cell" else {"data": 64})
    config.training.batch_size = 2 if axis == "cell" else 64
    assert rehearse.run(config, tmp_path) == 0
    small_machine, large = json.loads((tmp_path / "rehearsal.json").read_text())["weak_scaling"]
    assert [small_machine["chips"], large["chips"]] == [16, 64]
    assert [small_machine["cells"], large["cells"]] == ([8, 32] if axis == "cell" else [1, 1])
    assert [small_machine["batch"], large["batch"]] == ([2, 2] if axis == "cell" else [16, 64])
    assert large["flops"] == pytest.approx(small_machine["flops"], rel=0.01)
    assert large["peak"] == pytest.approx(small_machine["peak"], rel=0.05)
    # A ring of n chips sends 2 (n - 1) / n of the gradient; between cells nothing is sent.
    ring = 1.0 if axis == "cell" else (63 / 64) / (15 / 16)
    assert small_machine["sent"] > 0
    assert large["sent"] == pytest.approx(ring * small_machine["sent"], rel=0.01)
