"""Stage 1 of the diffusion synthesizer: an autoencoder of unlabelled scans.

    python -m tumorjax.main --config=configs/autoencoder.py --workdir=runs/autoencoder
    python -m tumorjax.main --config=configs/autoencoder.py --config.data.store=STORE

Variants: virtual (default: the built-in cohort's pool of patients, minutes on 2 cores). Labels, where
there are any, only say where crops lie (training.centered). WORKDIR has the network, quality.json
(PSNR, SSIM and error in HU by tissue on held-out patients) and trained_on.json (who was seen).
"""

from ml_collections import ConfigDict

from data_prep import virtual_abdomen

VARIANTS = ("virtual",)


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
    config.data.source = "virtual"  # virtual, abdomen_atlas, nnunet, msd
    config.data.root = ""  # the scans' folder; empty for virtual: WORKDIR/scans
    config.data.labels = ConfigDict()  # names of labels, as in configs/preparation.py
    config.data.held_out = 0.1  # share of the patients that quality is measured on

    # The pool: patients of the built-in cohort's hospitals that no study has, by another seed.
    config.virtual = ConfigDict(
        {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in virtual_abdomen.default_settings().items()
        }
    )
    config.virtual.seed = 1000
    config.virtual.tumors = ("liver_lesion", "pancreatic_lesion", "kidney_lesion")
    config.virtual.patients_per_site = 40
    config.virtual.ood_patients_per_site = 0
    config.virtual.ood_sites = ()

    config.preparation = ConfigDict()
    config.preparation.spacing = (4.0, 4.0, 4.0)  # mm
    config.preparation.window = (-175.0, 250.0)  # HU that become -1 and 1
    config.preparation.order = 1

    config.model = ConfigDict()
    config.model.preset = "small"  # or "difftumor"; the other settings take the place of a preset's
    config.model.dtype = "auto"

    config.training = ConfigDict()
    config.training.patch_size = (32, 32, 32)
    config.training.batch_size = 4
    config.training.steps = 4000
    config.training.centered = 0.5  # share of crops on an organ or tumour; 0: labels are not used
    config.training.tumor_share = 0.5  # of those, on a tumour where there is one
    config.training.gradient = 0.5  # weight of the error of slopes, beside the absolute error's 1
    config.training.kl = 1e-4  # weight of the divergence from the unit Gaussian, nats a latent
    config.training.optimizer = "adamw"
    config.training.learning_rate = 2e-3
    config.training.weight_decay = 0.0
    config.training.clip = 1.0
    config.training.schedule = "warmup_cosine"
    config.training.warmup = 0.05
    config.training.save_every = 500
    config.training.log_every = 50
    config.training.loader_threads = 1

    config.evaluation = ConfigDict()
    config.evaluation.batches = 32  # of crops that quality and the latents' scale are measured on

    config.mesh = ConfigDict({"cell": 1, "data": -1, "fsdp": 1, "space": 1})
    config.processes = ConfigDict({"coordinator": "", "num_processes": 1, "process_id": 0})
    return config
