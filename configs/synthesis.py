"""Tumours into healthy scans: CT and organ masks in, CT with tumours and their masks out.

    python -m tumorjax.main --config=configs/synthesis.py --workdir=runs/synthesis \
        --config.input=AbdomenAtlas --config.organ=liver --config.size=small

`input` is a CASE/ct.nii.gz with CASE/segmentations/ORGAN.nii.gz beside it, a folder of such cases,
or one with ct/CASE and label/CASE (AbdomenAtlas' own). Written are, on the scan's own grid and in
HU, OUTPUT/CASE/ct.nii.gz and OUTPUT/CASE/segmentations/TUMOUR.nii.gz, and beside them
synthesis.json, which says how. What is finished in `output` is skipped. Cases that cannot be used
are listed in WORKDIR/rejected.csv.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "synthesis"
    config.input = ""
    config.output = ""  # empty: WORKDIR/scans

    config.organ = "liver"  # liver, pancreas, kidney, colon, esophagus, uterus
    config.size = "small"  # tiny, small, medium, large, or a radius in mm ("12.5")
    config.number = 0  # tumours a scan; 0: 1 to 3 tiny or small ones, else 1
    config.seed = 0

    config.synthesizer = "rules"
    config.prior = "difftumor"  # where shapes come from; "measured": as real tumours measure
    # How the organ's tumours are to differ from the usual ones, by the fields of
    # synthesis.texture.Texture; for instance {"contrast": (-40.0, -20.0), "mass_effect": 0.2}.
    config.texture = ConfigDict()
    config.workers = 1  # scans at a time; each takes a few GB where scans are large
    return config
