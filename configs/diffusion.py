"""Stage 2 of the diffusion synthesizer: tumours in the latents of a trained autoencoder.

    python -m tumorjax.main --config=configs/diffusion.py --workdir=runs/diffusion \
        --config.autoencoder=runs/autoencoder --config.data.store=runs/autoencoder/store

Variants: virtual (default: the built-in cohort's pool of patients, minutes on 2 cores), paper
(DiffTumor's recipe). One model learns the tumours of all organs that the store has. WORKDIR is
then a `checkpoint` of the synthesizer "diffusion". It has a copy of the autoencoder;
trained_on.json (who was seen); quality.json, quality.png and few_steps.png (real against generated
tumours of held-out patients, and what sampling in few steps costs).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import autoencoder

VARIANTS = ("virtual", "paper")


def get_config(variant: str = "virtual") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    # The same scans, prepared the same way, divided the same way.
    first = autoencoder.get_config(variant)
    config = ConfigDict(
        {
            name: first[name]
            for name in (
                *("seed", "workers", "data", "virtual", "preparation", "mesh", "processes"),
                "monitor",
            )
        }
    )
    config.job = "diffusion"
    config.autoencoder = ""  # workdir of the job "autoencoder"
    config.data.organs = ()  # hosts of the tumours to learn; empty: all that there are

    config.model = ConfigDict()
    config.model.name = "latent_unet"  # or "video_unet", DiffTumor's
    config.model.preset = "small"  # or "large"
    config.model.widths = placeholder(tuple)  # these three take the place of the preset's
    config.model.blocks = placeholder(int)
    config.model.attention_heads = placeholder(int)
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
    config.training.clip = 1.0  # of the gradient's norm; 0: none
    config.training.accumulation = 1  # batches in one step of Adam
    config.training.ema = 0.998
    config.training.save_every = 250
    config.training.log_every = 25
    config.training.loader_threads = 1

    config.quality = ConfigDict()
    config.quality.tumors = 40  # held-out tumours of each organ at most
    config.quality.few_steps = (1, 2, 4, 8)  # numbers of steps that are compared
    config.quality.fine_steps = 32  # with so many
    config.quality.few_steps_tumors = 8  # of each organ
    if variant == "paper":
        _paper(config)
    return config


def _paper(config: ConfigDict) -> None:
    """DiffTumor's recipe for early tumours: its denoiser, four steps, 60,000 batches.

    Its settings for medium and large tumours are diffusion.timesteps=200, diffusion.sampler=ddim
    and diffusion.steps=50. DiffTumor trains a model for each organ (data.organs) and stage; this
    one learns all of them, and with model.told=True it is told which.
    """
    config.data.source = "abdomen_atlas"  # or another one with annotated tumours
    config.model = ConfigDict()
    config.model.name = "video_unet"
    config.model.preset = "difftumor"
    config.model.width = placeholder(int)  # these four take the place of the preset's
    config.model.multipliers = placeholder(tuple)
    config.model.heads = placeholder(int)
    config.model.head_width = placeholder(int)
    config.model.told = False
    config.model.dtype = "auto"
    config.diffusion.objective = "noise"
    config.diffusion.timesteps = 4
    config.diffusion.hole_margin = 0
    config.diffusion.sampler = "ancestral"
    config.diffusion.steps = 4
    config.diffusion.clip = 1.0
    config.training.crop = (96, 96, 96)
    config.training.batch_size = 2
    config.training.steps = 60_000
    config.training.mirror_axes = ()
    config.training.loss = "l1"
    config.training.far_weight = 1.0
    config.training.condition_dropout = 0.0
    config.training.learning_rate = 1e-4
    config.training.schedule = "constant"
    config.training.clip = 0.0
    config.training.accumulation = 2
    config.training.ema = 0.995
    config.training.save_every = 1000
    config.training.log_every = 100
    config.training.loader_threads = 8
