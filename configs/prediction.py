"""Masks for scans: CT in, labels on the scans' own grids out.

    python -m tumorjax.main --config=configs/prediction.py --workdir=runs/prediction \
        --config.checkpoint=runs/segmentation --config.input=imagesTs --config.output=predictions

`checkpoint` may be a model folder of nnU-Net's (plans.json, dataset.json, fold_0/ and so on): the
scans then go its way, with its spacing, normalization and labels.

`input` is a NIfTI file; a folder of them (names may end in nnU-Net's _0000); or a folder in
AbdomenAtlas' layout (CASE/ct.nii.gz). What is finished in `output` is skipped. Cases that cannot
be used are listed in WORKDIR/rejected.csv.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "prediction"
    config.checkpoint = ""  # folder of a cell, of a segmentation job, or a model of nnU-Net's
    config.step = placeholder(int)  # of one trained here; None: the newest checkpoint
    config.folds = ()  # of nnU-Net's, averaged; empty: all that are there
    config.input = ""
    config.output = ""  # empty: WORKDIR/predictions

    # labels: CASE.nii.gz, values are the ids of anatomy.py, or those of nnU-Net's dataset.json
    # (OUTPUT/labels.json says which).
    # structures: CASE/segmentations/NAME.nii.gz, one mask a structure, as AbdomenAtlas has it.
    config.form = "labels"

    config.inference = ConfigDict()
    config.inference.overlap = 0.5  # of neighbouring patches
    # Axes whose flips are averaged, (0, 1, 2): eight times the work. None: as the network was made
    # to be used, which is none for one trained here and those that nnU-Net's checkpoint allows.
    config.inference.mirror_axes = placeholder(tuple)
    config.inference.batch_size = 2  # patches a forward pass
    config.inference.skip_air = True  # patches of nothing but air are background (not in nnU-Net's)
    return config
