"""Stage 2 of the diffusion synthesizer: tumours in the latents of a trained autoencoder.

    python -m tumorjax.main --config=configs/diffusion.py --workdir=runs/diffusion \
        --config.autoencoder=runs/autoencoder --config.data.store=runs/autoencoder/store

Variants: virtual (default: the built-in cohort's pool of patients, minutes on 2 cores). One model
learns the tumours of all organs that the store has. WORKDIR is then a `checkpoint` of the
synthesizer "diffusion": it has a copy of the autoencoder, quality.json and quality.png (real
against generated tumours of held-out patients) and trained_on.json (who was seen).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import autoencoder

VARIANTS = ("virtual",)


def get_config(variant: str = "virtual") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    # The same scans, prepared the same way, divided the same way.
    first = autoencoder.get_config("virtual")
    config = ConfigDict(
        {
            name: first[name]
            for name in ("seed", "workers", "data", "virtual", "preparation", "mesh", "processes")
        }
    )
    config.job = "diffusion"
    config.autoencoder = ""  # workdir of the job "autoencoder"
    config.data.organs = ()  # hosts of the tumours to learn; empty: all that there are

    config.model = ConfigDict()
    config.model.name = "latent_unet"  # or "video_unet", DiffTumor's
    config.model.preset = "small"
    config.model.dtype = "auto"  # bfloat16 on accelerators, float32 on CPU

    config.diffusion = ConfigDict()
    config.diffusion.objective = "flow"  # or "noise" or "v", on the cosine schedule
    config.diffusion.timesteps = 1000  # of the schedule; flow has none
    config.diffusion.time_distribution = "uniform"  # of flow's times in training; or "logit_normal"
    config.diffusion.hole_margin = 1  # voxels about a tumour that are made anew with it
    # How it is sampled from unless whoever uses it says otherwise.
    config.diffusion.sampler = "euler"  # or "heun"; "ddim" or "ancestral" for noise and v
    config.diffusion.steps = 4
    config.diffusion.guidance = 1.0  # on organ and size; 1: none
    config.diffusion.clip = placeholder(float)  # bound of the latents, for noise and v

    config.training = ConfigDict()
    config.training.crop = (32, 32, 32)
    config.training.batch_size = 8
    config.training.steps = 3000
    config.training.jitter = 0.2  # how far tumours lie from the crop's middle, share of its side
    config.training.mirror_axes = (0, 1, 2)
    config.training.loss = "l2"  # or "l1"
    config.training.far_weight = 0.05  # of the error where the tumour changes nothing
    config.training.condition_dropout = 0.1  # share of crops without organ and radius
    config.training.learning_rate = 1e-3
    config.training.schedule = "warmup_cosine"  # or "constant", "poly"
    config.training.warmup = 0.05
    config.training.clip = 1.0
    config.training.accumulation = 1  # batches in one step of Adam
    config.training.ema = 0.998
    config.training.save_every = 250
    config.training.log_every = 25
    config.training.loader_threads = 1

    config.quality = ConfigDict()
    config.quality.tumors = 40  # held-out tumours of each organ at most
    return config
