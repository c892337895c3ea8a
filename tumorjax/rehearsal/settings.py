"""What a rehearsal cannot know by itself."""

from typing import Any

from tumorjax.rehearsal.chips import CHIPS

DEFAULTS: dict[str, Any] = {
    "prices": dict.fromkeys(CHIPS, 0.0),  # per chip-hour, in any currency; 0: not known
    "weak_scaling": True,  # see how the step grows from 16 and 64 chips; False saves minutes
    "efficiency": 0.5,  # share of the roofline's rate that a real machine is assumed to reach
    "test_scans": 1000,  # that each cell is tested on
    "scan": (256, 256, 300),  # voxels of one, on the network's grid
}
