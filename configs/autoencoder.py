"""Stage 1 of the diffusion synthesizer: an autoencoder of unlabelled scans.

    python -m tumorjax.main --config=configs/autoencoder.py --workdir=runs/autoencoder
    python -m tumorjax.main --config=configs/autoencoder.py --config.data.store=STORE

Variants: virtual (default: the built-in cohort's pool of patients, minutes on 2 cores), paper
(DiffTumor's VQ-GAN and its training, for a GPU, on scans of one's own). Labels, where there are
any, only say where crops lie (training.centered). WORKDIR has the network, quality.json
(PSNR, SSIM and error in HU by tissue on held-out patients) and trained_on.json (who was seen).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import scaling
from tumorjax import parallel, processes
from tumorjax.training import monitor

VARIANTS = ("virtual", "paper")


def get_config(variant: str = "virtual") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.job = "autoencoder"
    config.seed = 0
    config.workers = 2  # processes that prepare scans

    config.data = ConfigDict()
    config.data.store = ""  # a prepared store; empty: prepare data.root into WORKDIR/store
    config.data.source = "virtual"  # virtual, scans, abdomen_atlas, nnunet, msd
    config.data.root = ""  # the scans' folder; empty for virtual: WORKDIR/scans
    config.data.labels = ConfigDict()  # names of labels, as in configs/preparation.py
    config.data.held_out = 0.1  # share of the patients that quality is measured on

    # The pool: the default study's scanners and tumours, of all three organs, in patients that no
    # study has: those of another seed.
    config.virtual = scaling.virtual_cohort()
    config.virtual.seed = 1000
    config.virtual.tumors = ("liver_lesion", "pancreatic_lesion", "kidney_lesion")
    config.virtual.patients_per_site = 40
    config.virtual.ood_patients_per_site = 0

    config.preparation = scaling.preparation()  # the window's ends become -1 and 1

    config.model = ConfigDict()
    config.model.preset = "small"  # or "difftumor"
    # Each takes the place of the preset's (tumorjax/synthesis/autoencoder.py says what they are).
    config.model.kind = placeholder(str)
    config.model.widths = placeholder(tuple)
    config.model.decoder_widths = placeholder(tuple)
    config.model.latent_channels = placeholder(int)
    config.model.encoder_blocks = placeholder(tuple)
    config.model.decoder_blocks = placeholder(tuple)
    config.model.norm = placeholder(str)
    config.model.padding = placeholder(str)
    config.model.dtype = "auto"  # bfloat16 on accelerators, float32 on CPU

    config.training = ConfigDict()
    config.training.patch_size = (32, 32, 32)
    config.training.batch_size = 4
    config.training.steps = 4000
    config.training.centered = 0.5  # share of crops on an organ or tumour; 0: labels are not used
    config.training.tumor_share = 0.5  # of those, on a tumour where there is one
    config.training.reconstruction = 1.0  # weight of the absolute error
    config.training.gradient = 0.5  # weight of the error of slopes: sharper edges and textures
    config.training.kl = 1e-4  # of kind "kl": weight of the divergence from the unit Gaussian
    config.training.codes = 16384  # of kind "vq", and the three below
    config.training.codebook_decay = 0.99
    config.training.least_use = 1.0  # codes that fewer latents a batch are near to start anew
    config.training.commitment = 0.25
    # Folder of a cell or a segmentation job whose network's features are compared; empty: none.
    config.training.perceptual = ""
    config.training.perceptual_weight = 4.0
    config.training.adversarial_from = 0  # step from which discriminators train; 0: none
    config.training.adversarial_slices = 1.0
    config.training.adversarial_crops = 1.0
    config.training.feature_matching = 4.0
    config.training.optimizer = "adamw"  # or "adam", "sgd"
    config.training.learning_rate = 2e-3
    config.training.weight_decay = 0.0
    config.training.clip = 1.0
    config.training.momentum = 0.9  # of sgd
    config.training.betas = (0.5, 0.9)  # of adam
    config.training.schedule = "warmup_cosine"  # or "drops", "poly"
    config.training.warmup = 0.05
    config.training.epoch_steps = 250  # of "poly"
    config.training.power = 0.9
    # Of "drops": steps at which the rate falls to 0.1.
    config.training.drops = (40_000, 50_000, 60_000)
    config.training.save_every = 500
    config.training.log_every = 50
    config.training.loader_threads = 1

    config.evaluation = ConfigDict()
    config.evaluation.batches = 32  # of crops that quality and the latents' scale are measured on

    config.mesh = ConfigDict(parallel.SIZES | {"data": -1})
    config.processes = ConfigDict(processes.DEFAULTS)  # that train together
    config.monitor = ConfigDict(monitor.DEFAULTS)  # where curves and profiles go

    if variant == "paper":
        _paper(config)
    return config


def _paper(config: ConfigDict) -> None:
    """DiffTumor's stage 1: a VQ-GAN of crops of 96^3 at 1 mm, 80,000 steps on 9,262 scans of CT."""
    config.workers = 8
    config.data.source = "scans"  # a folder of unlabelled ones: set data.root
    config.preparation.spacing = (1.0, 1.0, 1.0)  # mm
    config.preparation.order = 3

    config.model.preset = "difftumor"

    config.training.patch_size = (96, 96, 96)
    config.training.batch_size = 2
    config.training.steps = 80_000
    config.training.centered = 0.0  # crops anywhere
    config.training.reconstruction = 4.0
    config.training.gradient = 0.0
    config.training.adversarial_from = 10_000
    config.training.optimizer = "adam"
    config.training.learning_rate = 3e-4
    config.training.schedule = "drops"
    config.training.save_every = 1000
    config.training.log_every = 100
    config.training.loader_threads = 8
