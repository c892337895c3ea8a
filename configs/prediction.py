"""Masks for scans: CT in, labels on the scans' own grids out.

    python -m tumorjax.main --config=configs/prediction.py --workdir=runs/prediction \
        --config.checkpoint=runs/segmentation --config.input=imagesTs --config.output=predictions

`input` is a NIfTI file; a folder of them (names may end in nnU-Net's _0000); or a folder in
AbdomenAtlas' layout (CASE/ct.nii.gz). What is finished in `output` is skipped. Cases that cannot
be used are listed in WORKDIR/rejected.csv.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "prediction"
    config.checkpoint = ""  # folder of a cell or of a segmentation job
    config.step = placeholder(int)  # None: the newest checkpoint
    config.input = ""
    config.output = ""  # empty: WORKDIR/predictions

    # labels: CASE.nii.gz, values are the ids of anatomy.py (and in OUTPUT/labels.json).
    # structures: CASE/segmentations/NAME.nii.gz, one mask a structure, as AbdomenAtlas has it.
    config.form = "labels"

    config.inference = ConfigDict()
    config.inference.overlap = 0.5  # of neighbouring patches
    config.inference.mirror_axes = ()  # (0, 1, 2) as nnU-Net: eight times the work
    config.inference.batch_size = 2  # patches a forward pass
    config.inference.skip_air = True  # patches of nothing but air are background
    return config
