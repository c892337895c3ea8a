import json

import pytest

from configs import scaling
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
