"""The scaling study.

    python -m tumorjax.main --config=configs/scaling.py
    python -m tumorjax.main --config=configs/scaling.py:virtual_large
    python -m tumorjax.main --config=configs/scaling.py:worth
    python -m tumorjax.main --config=configs/scaling.py:paper --config.data.root=ABDOMENATLAS

Variants: virtual (default: the built-in cohort, minutes on 2 cores), virtual_large (the same with
more patients, seeds and steps), worth (virtual with three seeds: what a synthesizer is worth, see
configs/worth.py), paper (the study of Chen et al., ICCV 2025, on AbdomenAtlas 2.0),
paper_pancreas (their study of pancreatic tumours, Table 5, on scans of one's own).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from data_prep import virtual_abdomen
from tumorjax import parallel, processes
from tumorjax.data import augmentation
from tumorjax.evaluation import settings as evaluation
from tumorjax.rehearsal import settings as rehearsal
from tumorjax.training import monitor

VARIANTS = ("virtual", "virtual_large", "worth", "paper", "paper_pancreas")


def get_config(variant: str = "virtual") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.job = "scaling"
    config.seed = 0  # of the cohort: splits and synthetic scans, the same for all cells
    config.workers = 2  # processes that prepare scans
    config.cpu_devices = 2  # cells that a CPU trains side by side; accelerators take one each

    config.data = ConfigDict()
    config.data.store = ""  # a prepared store; empty: prepare data.root into WORKDIR/store
    config.data.source = "virtual"  # virtual, abdomen_atlas, nnunet, msd
    config.data.root = ""  # the scans' folder; empty for virtual: WORKDIR/scans
    config.data.labels = ConfigDict()  # names of labels, as in configs/preparation.py

    config.virtual = virtual_cohort()
    config.preparation = preparation()

    config.cohort = ConfigDict()
    config.cohort.ood_sites = tuple(config.virtual.ood_sites)  # never trained on
    config.cohort.id_test = 24.0  # patients held out: a number above 1, or a share
    config.cohort.ood_test = 1.0
    config.cohort.annotated = "tumor"  # or "all": tumour-free scans count as annotated too

    config.task = ConfigDict()
    config.task.classes = ConfigDict(
        {"kidney": ("kidney_left", "kidney_right"), "kidney_lesion": ("kidney_lesion",)}
    )

    config.grid = ConfigDict()
    config.grid.n_real = (1, 3, 10, 30)
    config.grid.arms = ("real", "real+synthetic")
    config.grid.seeds = (0,)
    # How cells share devices. "stacked": in one step, one cell at each position along mesh.cell;
    # "threads": each for itself; "auto": stacked on accelerators and in jobs of several processes.
    config.grid.side_by_side = "auto"

    config.synthesis = ConfigDict()
    config.synthesis.store = ""  # empty: WORKDIR/synthetic
    config.synthesis.synthesizer = "rules"  # or "diffusion"
    config.synthesis.prior = "difftumor"  # of shapes
    config.synthesis.per_real = 3
    config.synthesis.sizes = ConfigDict({"small": 4.0, "medium": 2.0, "large": 1.0})
    config.synthesis.online = False  # True: no store, new tumours in every training step
    # Of "diffusion". trained_on "pool": `checkpoint` is the workdir of a job "diffusion", whose
    # patients none of the tests may have; "cell": every cell trains its own on its annotated scans.
    config.synthesis.trained_on = "pool"
    config.synthesis.checkpoint = ""
    config.synthesis.sampler = placeholder(str)  # those of its training where none is given
    config.synthesis.steps = placeholder(int)
    config.synthesis.guidance = placeholder(float)
    config.synthesis.networks = _networks("virtual")  # what cells train, see configs/diffusion.py

    config.model = ConfigDict()
    config.model.name = "resenc_unet"  # or another of tumorjax.models.NETWORKS
    config.model.preset = "small"  # every network has one
    config.model.widths = placeholder(tuple)  # instead of the preset's, where a network has them
    config.model.blocks = placeholder(tuple)
    config.model.dtype = "auto"  # bfloat16 on accelerators, float32 on CPU
    config.model.remat = False

    config.training = ConfigDict()
    config.training.patch_size = (32, 32, 32)
    config.training.batch_size = 2
    config.training.steps = 400
    config.training.foreground = 0.5  # share of crops that are centred on foreground
    config.training.tumor_share = 0.8  # of those, on a tumour where there is one; None: any class
    config.training.deep_supervision = False
    config.training.batch_dice = True  # one Dice score for the batch, not for each crop
    config.training.absent_dice = False  # leave classes out of it that no crop of the batch has
    config.training.cross_entropy_weight = 0.5  # beside Dice; 1 is nnU-Net's
    config.training.optimizer = "adamw"  # or "sgd"
    config.training.learning_rate = 0.005
    config.training.momentum = 0.9  # of sgd
    config.training.weight_decay = 1e-4
    config.training.clip = 12.0
    config.training.schedule = "warmup_cosine"  # or "poly"
    config.training.warmup = 0.05
    config.training.epoch_steps = 250  # of the schedule "poly"
    config.training.power = 0.9
    # Fine-tuning. start_from: folder of a cell or a segmentation job, nnU-Net's model folder, or a
    # file of PyTorch weights. Patterns are what parameters' names begin with (regular expressions).
    config.training.start_from = ""  # empty: weights drawn from the seed
    config.training.freeze = ()  # patterns of what stays as it is: ("stem", "encoder")
    config.training.layer_learning_rates = ()  # (pattern, factor), first match: (("encoder", 0.1),)
    config.training.save_every = 100
    config.training.log_every = 25
    config.training.loader_threads = 1

    config.augmentation = ConfigDict(augmentation.CHEAP)
    # In few steps, mirrored bodies are too much to learn beside the real ones: with them, what
    # lies where is no help against false positives.
    config.augmentation.mirror_axes = ()

    config.inference = ConfigDict()
    config.inference.overlap = 0.5
    config.inference.mirror_axes = ()
    config.inference.batch_size = 2
    config.inference.skip_air = True

    config.evaluation = ConfigDict(evaluation.DEFAULTS)
    config.evaluation.minimum_mm3 = 500.0  # 8 voxels of this grid

    config.laws = ConfigDict()
    config.laws.margin = 1.0
    config.laws.bootstrap = 500

    config.report = ConfigDict()
    config.report.samples = 2  # test scans of each split that are shown

    config.mesh = ConfigDict(parallel.SIZES | {"cell": -1})
    # Processes that train together, see tumorjax/cluster.py: coordinator "" for one process alone.
    config.processes = ConfigDict(processes.DEFAULTS)
    config.monitor = ConfigDict(monitor.DEFAULTS)  # where curves and profiles go

    # A machine that the job is compiled for instead of being run, such as "v5e:16x16": what it
    # takes in memory, time and money, see docs/scale.md.
    config.rehearse = ""
    config.rehearsal = ConfigDict(rehearsal.DEFAULTS)

    if variant == "virtual_large":
        _virtual_large(config)
    elif variant == "worth":
        config.grid.seeds = (0, 1, 2)
    elif variant in ("paper", "paper_pancreas"):
        _paper(config)
        if variant == "paper_pancreas":
            _pancreas(config)
    return config


def virtual_cohort() -> ConfigDict:
    """Returns the built-in cohort; data_prep/virtual_abdomen.py says what each setting does.

    A study of minutes can learn one kind of tumour, the largest one, with more contrast and less
    noise than real ones have. Much more contrast is no help: beyond 2 such tumours look like fat.
    """
    virtual = ConfigDict(
        {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in virtual_abdomen.default_settings().items()
        }
    )
    virtual.tumors = ("kidney_lesion",)
    virtual.patients_per_site = 14
    virtual.ood_patients_per_site = 6
    virtual.contrast = 1.6
    virtual.noise = 0.6
    virtual.variation = 0.6
    virtual.distractors = 0.5
    return virtual


def preparation() -> ConfigDict:
    """Returns how scans of the built-in cohort are prepared."""
    return ConfigDict(
        {
            "spacing": (4.0, 4.0, 4.0),  # mm
            "window": (-175.0, 250.0),  # HU that become 0 and 1
            "order": 1,  # of the image's interpolation: 1 linear, 3 cubic
        }
    )


def _networks(variant: str) -> ConfigDict:
    """Returns how a cell trains a synthesizer of its own: sections of the two jobs' configs."""
    from configs import autoencoder, diffusion

    first, second = autoencoder.get_config(variant), diffusion.get_config(variant)
    return ConfigDict(
        {
            "autoencoder": {name: first[name] for name in ("model", "training", "evaluation")},
            "diffusion": {
                name: second[name] for name in ("model", "diffusion", "training", "quality")
            },
        }
    )


def _three_organs(config: ConfigDict) -> None:
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


def _virtual_large(config: ConfigDict) -> None:
    """More patients, seeds and steps: an hour or two on 2 cores."""
    config.virtual.patients_per_site = 28
    config.virtual.ood_patients_per_site = 10
    config.cohort.id_test = 40
    config.grid.n_real = (1, 4, 16, 64)
    config.grid.seeds = (0, 1, 2)
    config.training.steps = 700


def _paper(config: ConfigDict) -> None:
    """The paper's study on AbdomenAtlas 2.0: liver, pancreas and kidney with ResEncM.

    Sites that are never trained on have to be named in cohort.ood_sites; a file patients.csv
    (case, patient, site) beside the scans says where each scan comes from.
    """
    config.data.source = "abdomen_atlas"
    config.workers = 16
    config.cpu_devices = 1
    config.preparation.spacing = (1.5, 1.5, 1.5)
    config.preparation.order = 3
    config.cohort.ood_sites = ()
    config.cohort.id_test = 0.1
    config.cohort.annotated = "all"
    _three_organs(config)
    config.synthesis.networks = _networks("paper")
    config.grid.n_real = (60, 120, 278, 435, 750, 1125, 1500, 3159)
    config.grid.seeds = (0,)
    config.model = ConfigDict(
        {"name": "resenc_unet", "preset": "M", "dtype": "auto", "remat": False}
    )
    config.training = ConfigDict(
        {
            "patch_size": (96, 96, 96),
            "batch_size": 2,
            "steps": 1000 * 250,
            "foreground": 1 / 3,
            "tumor_share": None,
            "deep_supervision": True,
            "batch_dice": False,
            "absent_dice": True,
            "cross_entropy_weight": 1.0,
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "momentum": 0.99,
            "weight_decay": 3e-5,
            "clip": 12.0,
            "schedule": "poly",
            "warmup": 0.0,
            "epoch_steps": 250,
            "power": 0.9,
            "start_from": "",
            "freeze": (),
            "layer_learning_rates": (),
            "save_every": 2500,
            "log_every": 250,
            "loader_threads": 8,
        }
    )
    config.augmentation = ConfigDict(augmentation.DEFAULT)
    config.inference.mirror_axes = (0, 1, 2)
    config.inference.skip_air = False
    config.evaluation.minimum_mm3 = 0.0


def _pancreas(config: ConfigDict) -> None:
    """The paper's study of pancreatic tumours: 5,176 scans, SegResNet, 2,017 held out, PANORAMA.

    The network and its training are those of Myronenko (arXiv:1810.11654) but for its dropout and
    its branch that reconstructs the image; MONAI's SegResNet, which the paper took, has no branch.
    """
    config.data.source = "nnunet"
    config.cohort.id_test = 2017
    config.task.classes = ConfigDict(
        {"pancreas": ("pancreas",), "pancreatic_lesion": ("pancreatic_lesion",)}
    )
    config.model = ConfigDict(
        {
            "name": "segresnet",
            "init_filters": 32,
            "blocks_down": (1, 2, 2, 4),
            "blocks_up": (1, 1, 1),
            "dtype": "auto",
            "remat": False,
        }
    )
    config.training.deep_supervision = False
    config.training.optimizer = "adamw"
    config.training.learning_rate = 1e-4
    config.training.weight_decay = 1e-5
