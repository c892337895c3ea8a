"""Numbers for a segmenter: from two folders of masks, or from a checkpoint and a store.

    python -m tumorjax.main --config=configs/evaluation.py --workdir=runs/evaluation \
        --config.truth=labelsTs --config.prediction=predictions --config.labels=dataset.json \
        --config.tumors="('tumor',)"
    python -m tumorjax.main --config=configs/evaluation.py --workdir=runs/evaluation \
        --config.checkpoint=runs/segmentation --config.data.store=runs/preparation/store

Writes cases.csv (a row per case and tumour), summary.csv (means with 95 % intervals), summary.json
(nnU-Net's form, all labels) and rejected.csv (cases set aside).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "evaluation"
    config.seed = 0  # of the bootstrap

    # Either two folders with one NIfTI file per case: same names, and each pair on one grid.
    config.truth = ""
    config.prediction = ""
    config.labels = ""  # an nnU-Net dataset.json; empty: values are the ids of anatomy.py
    config.tumors = ()  # which labels are tumours; empty: those that anatomy.py knows
    config.patients = ""  # CSV with case, patient, where a patient has several scans
    config.workers = 0  # processes; 0: one per core

    # Or a trained network (folder of a cell or a segmentation job) and prepared scans.
    config.checkpoint = ""
    config.data = ConfigDict()
    config.data.store = ""
    config.data.cases = ()  # empty: all
    config.inference = ConfigDict()
    config.inference.overlap = 0.5
    config.inference.mirror_axes = ()  # (0, 1, 2) as nnU-Net: eight times the work
    config.inference.batch_size = 2

    config.split = ""  # id or ood, or whatever the tables should say

    config.evaluation = ConfigDict()
    config.evaluation.tolerance_mm = 2.0  # NSD
    config.evaluation.tolerances_mm = ConfigDict()  # class -> NSD tolerance, where it differs
    config.evaluation.connectivity = 26  # of lesions: 6, 18 or 26
    config.evaluation.minimum_mm3 = 0.0  # predicted components below are dropped first
    config.evaluation.lesion_rule = "any"  # or fraction, iou
    config.evaluation.lesion_threshold = placeholder(float)  # a share; None: the rule's default
    config.evaluation.early_diameter = "sphere"  # or recist
    config.evaluation.early_mm = 20.0
    config.evaluation.resamples = 1000
    config.evaluation.confidence = 0.95
    return config
