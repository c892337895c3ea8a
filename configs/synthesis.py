"""Tumours into healthy scans: CT in, CT with tumours and their masks out.

    python -m tumorjax.main --config=configs/synthesis.py --workdir=runs/synthesis \
        --config.input=AbdomenAtlas --config.organ=liver --config.size=small
    python -m tumorjax.main --config=configs/synthesis.py --workdir=runs/synthesis \
        --config.input=scan.nii.gz --config.masks=organs.nii.gz --config.labels=totalsegmentator \
        --config.organ=pancreas,liver --config.size=12,25 --config.size_is=diameter \
        --config.synthesizer=diffusion --config.checkpoint=runs/diffusion

`input` is a NIfTI file of any name, CASE/ct.nii.gz, a folder of either, or one with ct/CASE and
label/CASE (AbdomenAtlas' own). Organs are told by masks beside the scan
(CASE/segmentations/ORGAN.nii.gz), by `masks`, or by a network (`checkpoint_organs`). Written are,
on the scan's own grid and in HU, OUTPUT/CASE/ct.nii.gz and OUTPUT/CASE/segmentations/TUMOUR.nii.gz,
and beside them preview.png (before and after) and synthesis.json, which says how and where. What is
finished in `output` is skipped. Cases that cannot be used are listed in WORKDIR/rejected.csv.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "synthesis"
    config.input = ""
    config.output = ""  # empty: WORKDIR/scans

    # liver, pancreas, kidney, colon, esophagus, uterus; several as "liver,pancreas"
    config.organ = "liver"
    # tiny, small, medium, large, or mm ("12.5"); one for all organs, or one for each, "12,25"
    config.size = "small"
    config.size_is = "radius"  # what mm are: "radius" or "diameter", of the ball of equal volume
    config.number = 0  # tumours of each organ in a scan; 0: as the prior has it, 1 where size is mm
    config.position = "anywhere"  # in the organ; "inside", or "border": touching it
    config.margin_mm = 3.0  # of organ around tumours that lie "inside"
    config.seed = 0

    # Masks of the organs, where they are not beside the scans: a NIfTI file whose values are
    # structures, or a folder with CASE.nii.gz or CASE/segmentations.
    config.masks = ""
    # What the values are: "{'liver': 5, 'pancreas': 7}", or "totalsegmentator" (its classes,
    # version 2). Empty: as labels.json beside them says, else the ids of anatomy.py.
    config.labels = ""
    # Or a network that finds them, as configs/prediction.py takes one.
    config.checkpoint_organs = ""
    config.names = ConfigDict()  # which structures nnU-Net's labels are: {"kidneys": "kidney"}
    config.inference = ConfigDict(
        {
            "overlap": 0.5,
            "mirror_axes": placeholder(tuple),
            "batch_size": 2,
            "skip_air": True,
        }
    )

    config.synthesizer = "rules"  # or "diffusion"
    config.prior = "difftumor"  # where shapes come from; "measured": as real tumours measure
    # Of "diffusion": the workdir of a diffusion job, and how it samples (None: as it was made to).
    config.checkpoint = ""
    config.sampler = placeholder(str)
    config.steps = placeholder(int)
    config.guidance = placeholder(float)
    # Of "rules": how tumours are to differ from the usual ones, by the fields of
    # synthesis.texture.Texture; for instance {"contrast": (-40.0, -20.0), "mass_effect": 0.2}, or
    # by organ, {"liver": {"contrast": (-40.0, -20.0)}}.
    config.texture = ConfigDict()

    config.preview = True  # CASE/preview.png
    config.workers = 1  # scans at a time; each takes a few GB where scans are large
    return config
