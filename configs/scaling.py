"""The scaling study.

    python -m tumorjax.main --config=configs/scaling.py
    python -m tumorjax.main --config=configs/scaling.py:virtual_large
    python -m tumorjax.main --config=configs/scaling.py:paper --config.data.root=ABDOMENATLAS

Variants: virtual (default: the built-in cohort, minutes on 2 cores), virtual_large (the same with
more patients, seeds and steps), paper (the study of Chen et al., ICCV 2025, on AbdomenAtlas 2.0).
"""

from ml_collections import ConfigDict

from tumorjax.data import augmentation

VARIANTS = ("virtual", "virtual_large", "paper")


def get_config(variant: str = "virtual") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.job = "scaling"
    config.seed = 0  # of the cohort: splits and synthetic scans, the same for all cells
    config.workers = 2  # processes that prepare scans

    config.data = ConfigDict()
    config.data.store = ""  # a prepared store; empty: prepare data.root into WORKDIR/store
    config.data.source = "virtual"  # virtual, abdomen_atlas, nnunet, msd
    config.data.root = ""  # the scans' folder; empty for virtual: WORKDIR/scans

    config.virtual = ConfigDict()
    config.virtual.seed = 0

    config.preparation = ConfigDict()
    config.preparation.spacing = (3.0, 3.0, 3.0)  # mm
    config.preparation.window = (-175.0, 250.0)  # HU that become 0 and 1

    config.cohort = ConfigDict()
    config.cohort.ood_sites = ()
    config.cohort.id_test = 0.2  # patients held out: a number, or a share
    config.cohort.ood_test = 1.0
    config.cohort.annotated = "tumor"  # or "all": tumour-free scans count as annotated too

    config.task = ConfigDict()
    config.task.classes = ConfigDict(
        {
            "kidney": ("kidney_left", "kidney_right"),
            "kidney_lesion": ("kidney_lesion",),
            "liver": ("liver",),
            "liver_lesion": ("liver_lesion",),
            "pancreas": ("pancreas",),
            "pancreatic_lesion": ("pancreatic_lesion",),
        }
    )

    config.grid = ConfigDict()
    config.grid.n_real = (3, 6, 12, 24)
    config.grid.arms = ("real", "real+synthetic")
    config.grid.seeds = (0,)

    config.synthesis = ConfigDict()
    config.synthesis.store = ""  # empty: WORKDIR/synthetic
    config.synthesis.synthesizer = "rules"
    config.synthesis.per_real = 3
    config.synthesis.sizes = ConfigDict({"small": 4.0, "medium": 2.0, "large": 1.0})

    config.model = ConfigDict()
    config.model.name = "resenc_unet"
    config.model.widths = (8, 16, 32, 64)
    config.model.blocks = (1, 1, 1, 1)
    config.model.dtype = "auto"  # bfloat16 on accelerators, float32 on CPU
    config.model.remat = False

    config.training = ConfigDict()
    config.training.patch_size = (32, 32, 32)
    config.training.batch_size = 2
    config.training.steps = 300
    config.training.foreground = 0.5
    config.training.tumor_share = 0.75
    config.training.deep_supervision = False
    config.training.batch_dice = True  # one Dice score for the batch, not for each crop
    config.training.absent_dice = False  # leave classes out of it that no crop of the batch has
    config.training.cross_entropy_weight = 0.2  # beside Dice; 1 is nnU-Net's
    config.training.optimizer = "adamw"  # or "sgd"
    config.training.learning_rate = 0.01
    config.training.momentum = 0.9  # of sgd
    config.training.weight_decay = 3e-5
    config.training.clip = 12.0
    config.training.schedule = "warmup_cosine"
    config.training.warmup = 0.05
    config.training.epoch_steps = 250  # of the schedule "poly"
    config.training.power = 0.9
    config.training.save_every = 100
    config.training.log_every = 25
    config.training.loader_threads = 1

    config.augmentation = ConfigDict(augmentation.CHEAP)

    config.inference = ConfigDict()
    config.inference.overlap = 0.5
    config.inference.mirror_axes = ()
    config.inference.batch_size = 2
    config.inference.skip_air = True

    config.evaluation = ConfigDict()
    config.laws = ConfigDict()
    config.report = ConfigDict()
    config.report.samples = 3  # test scans of each split that are shown

    config.mesh = ConfigDict({"cell": -1, "data": 1, "fsdp": 1, "space": 1})
    config.processes = ConfigDict({"coordinator": "", "num_processes": 1, "process_id": 0})
    return config
