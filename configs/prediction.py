"""Masks for scans: CT in, labels on the scans' own grids out.

    python -m tumorjax.main --config=configs/prediction.py --workdir=runs/prediction \
        --config.checkpoint=runs/segmentation --config.input=imagesTs --config.output=predictions

Variants: nifti (default); dicom (series in, DICOM Segmentation objects out); msd_liver and
msd_pancreas (a submission to the Medical Segmentation Decathlon, see below).

`checkpoint` is the folder of a cell or of a segmentation job, a model folder of nnU-Net's
(plans.json, dataset.json, fold_0/ and so on: the scans then go its way, with its spacing,
normalization and labels), or several of them as an ensemble, "('runs/a', 'runs/b')": the mean of
their probabilities. Members must tell the same apart; spacing, patch and architecture are each its
own.

`input` is a NIfTI file; a folder of them (names may end in nnU-Net's _0000); a folder in
AbdomenAtlas' layout (CASE/ct.nii.gz); a folder with DICOM series at any depth; a .txt file with one
of these a line; or "('a.nii.gz', 'b.nii.gz')". Cases are called by files' and folders' names: where
these name patients, rename them first. Of headers only what says where voxels lie is kept; a DICOM
segmentation alone repeats its source's patient and study modules, as the standard demands.

What is finished in `output` is skipped. Cases that cannot be used are listed in
WORKDIR/rejected.csv, the rest goes on. The same command may run several times at once: processes
divide the scans among them. `num_parts` and `part` divide them beforehand.

A submission to the Decathlon: give the task's imagesTs as `input`. Masks get the task's values and
the images' names; when all are there, OUTPUT/Task03_Liver.zip (Task03_Liver/liver_N.nii.gz) is
written and checked against the images. The challenge's leaderboard wants folders of all ten tasks
in one archive. `python -m tumorjax.inference.msd ARCHIVE.zip imagesTs` checks any archive.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

VARIANTS = ("nifti", "dicom", "msd_liver", "msd_pancreas")


def get_config(variant: str = "nifti") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.job = "prediction"
    config.checkpoint = ""  # one, or several as an ensemble
    config.step = placeholder(int)  # of one trained here; None: the newest checkpoint
    config.folds = ()  # of nnU-Net's, averaged; empty: all that are there
    config.input = ""
    config.output = ""  # empty: WORKDIR/predictions

    # This process's share of the scans: every num_parts-th from part on (0 .. num_parts - 1).
    config.num_parts = 1
    config.part = 0

    # labels: CASE.nii.gz, values are the ids of anatomy.py, or those of nnU-Net's dataset.json
    # (OUTPUT/labels.json says which).
    # structures: CASE/segmentations/NAME.nii.gz, one mask a structure, as AbdomenAtlas has it.
    # dicom: CASE/segmentation.dcm, for DICOM series (needs the extra "dicom").
    config.form = "dicom" if variant == "dicom" else "labels"
    # A task of the Decathlon whose values, names and archive are wanted; empty: none.
    config.msd = {"msd_liver": "Task03_Liver", "msd_pancreas": "Task07_Pancreas"}.get(variant, "")
    # Which structures of anatomy.py nnU-Net's labels are, where their names are others:
    # "{'cancer': 'liver_lesion'}". For organs of tumours, codes in DICOM, and the Decathlon.
    config.names = ConfigDict()

    config.statistics = True  # CASE/statistics.json: volumes, lesions, diameters, centres
    config.preview = True  # CASE/preview.png: three planes through the largest tumour
    # Classes whose probabilities are kept: CASE/probabilities/NAME.nii.gz or NAME.zarr (float16).
    config.probabilities = ()
    config.probability_format = "nifti"  # or zarr

    # Predicted lesions that cannot be become the organ that they touch, or background.
    config.cleanup = ConfigDict()
    # A lesion stays within so many mm of its organ (0: that touch it). None: anywhere.
    config.cleanup.organ_distance = placeholder(float)
    config.cleanup.minimum_mm3 = 0.0  # smaller lesions go

    config.inference = ConfigDict()
    config.inference.overlap = 0.5  # of neighbouring patches
    # Axes whose flips are averaged, (0, 1, 2): eight times the work. None: as the network was made
    # to be used, which is none for one trained here and those that nnU-Net's checkpoint allows.
    config.inference.mirror_axes = placeholder(tuple)
    config.inference.batch_size = 2  # patches a forward pass
    config.inference.skip_air = True  # patches of nothing but air are background (not in nnU-Net's)
    return config
