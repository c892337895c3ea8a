"""What to change where a job does not fit its chips, or leaves them idle."""

from ml_collections import ConfigDict

from tumorjax.rehearsal.chips import Chip
from tumorjax.rehearsal.programs import Program


def advise(
    config: ConfigDict, chip: Chip, step: Program, mesh: dict[str, int], cells: int
) -> list[str]:
    """Returns sentences that name the setting to change, the most useful first.

    Args:
        config: of the job.
        chip: that it is for.
        step: its training step.
        mesh: axis -> size.
        cells: of the grid.
    """
    advice = []
    if step.too_large or step.peak > chip.memory:
        if not config.model.get("remat"):
            advice.append(
                "--config.model.remat=True computes the inside of blocks again in the backward"
                " pass: about a third more arithmetic for much less memory"
            )
        rows = mesh["data"] * mesh["fsdp"]
        if config.training.batch_size > rows:
            advice.append(
                f"--config.mesh.data={config.training.batch_size} gives each chip one crop of a"
                f" cell's {config.training.batch_size}"
            )
        elif config.training.batch_size > 1 and rows == 1:
            advice.append("a smaller training.batch_size")
        if step.arguments > chip.memory / 4:
            advice.append(
                f"--config.mesh.fsdp=2 divides the {step.arguments / 1e9:.1f} GB of parameters and"
                " momentum of a cell over two chips (the batch has to divide by it as well)"
            )
        advice.append(
            "--config.mesh.space=2 divides each volume's first axis over two chips; a smaller"
            " training.patch_size"
        )
    if step.gathered:
        advice.append(
            f"activations are gathered ({step.gathered[0]}): traffic grows with the chips. Take"
            " mesh.space as small as the memory allows"
        )
    if cells < mesh["cell"]:
        advice.append(
            f"{cells} cells leave {mesh['cell'] - cells} of {mesh['cell']} positions idle: take"
            f" --config.mesh.cell={cells} with more of the other axes, fewer chips, or more"
            " grid.seeds"
        )
    return advice
