"""Numbers for a segmenter: from two folders of masks, or from a checkpoint and a store.

    python -m tumorjax.main --config=configs/evaluation.py --workdir=runs/evaluation \
        --config.truth=labelsTs --config.prediction=predictions --config.labels=dataset.json \
        --config.tumors="('tumor',)"
    python -m tumorjax.main --config=configs/evaluation.py --workdir=runs/evaluation \
        --config.checkpoint=runs/segmentation --config.data.store=runs/preparation/store

With masks the numbers are on the scans' own grids, with a checkpoint on the network's; all that is
written says which. Writes cases.csv (a row per case and tumour), summary.csv (means with 95 %
intervals), summary.json (nnU-Net's form, all labels), tables/ (as the paper's Tables 3, 4 and 5),
worst/index.html (the worst cases with pictures) and rejected.csv (cases set aside); with a
checkpoint also froc.csv, figures/froc and thresholds.json. docs/evaluation.md describes them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "evaluation"
    config.seed = 0  # of the bootstrap
    config.name = ""  # of the model, for tables; empty: the name of its folder

    # Either two folders with one NIfTI file per case: same names, and each pair on one grid.
    config.truth = ""
    config.prediction = ""
    config.labels = ""  # an nnU-Net dataset.json; empty: values are the ids of anatomy.py
    config.images = ""  # the scans, for pictures of the worst cases; they are not needed

    # Or a trained network (folder of a cell or a segmentation job) and prepared scans.
    config.checkpoint = ""
    config.data = ConfigDict()
    config.data.store = ""
    config.data.cases = ()  # empty: all
    config.inference = ConfigDict()
    config.inference.overlap = 0.5
    config.inference.mirror_axes = ()  # (0, 1, 2) as nnU-Net: eight times the work
    config.inference.batch_size = 2

    config.tumors = ()  # which labels are tumours; empty: those that anatomy.py knows
    config.patients = ""  # CSV with case, patient, where a patient has several scans; also split
    config.split = ""  # id or ood, or whatever the tables should say
    config.workers = 0  # processes, the network's included; 0: one per core
    config.worst = 5  # pictures of so many cases of each kind; 0: none

    # Other models on the same cases: name -> workdir of their evaluation (or a study's cell), or,
    # beside two folders of masks, a folder of their masks.
    config.compare = ConfigDict()
    config.comparison = ConfigDict()
    config.comparison.resamples = 10_000  # p values are at least 2 / (resamples + 1)
    config.comparison.family = "metric"  # Holm's correction: over all tests of a metric, or all

    # FROC curves and thresholds, of a checkpoint.
    config.froc = ConfigDict()
    config.froc.thresholds = ()  # probabilities; empty: metrics.detection.THRESHOLDS
    config.froc.sensitivity = 90.0  # percent of tumours that annotators must be shown

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
