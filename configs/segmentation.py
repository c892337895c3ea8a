"""One segmenter, trained on the cases of a store.

    python -m tumorjax.main --config=configs/segmentation.py --config.data.store=STORE
    python -m tumorjax.main --config=configs/segmentation.py:resenc_m --config.data.store=STORE

Variants: virtual (default: the small network and short training of the default study), resenc_m
(nnU-Net's residual-encoder U-Net M and its training, for a GPU). The workdir is then a `checkpoint`
for configs/prediction.py and configs/evaluation.py.
"""

from ml_collections import ConfigDict

from configs import scaling
from tumorjax import parallel
from tumorjax.data import augmentation
from tumorjax.training.segmenter import SECTIONS

VARIANTS = ("virtual", "resenc_m")


def get_config(variant: str = "virtual") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    # What a cell of the study is trained with.
    study = scaling.get_config("virtual")
    names = (*SECTIONS, "processes", "monitor", "rehearse", "rehearsal")
    config = ConfigDict({name: study[name] for name in names})
    config.job = "segmentation"

    config.data = ConfigDict()
    config.data.store = ""  # path or URL of a store that the preparation job wrote
    config.data.cases = ()  # empty: all

    # One training, its batch over all devices; training.batch_size has to divide by them.
    config.mesh = ConfigDict(parallel.SIZES | {"data": -1})

    if variant == "resenc_m":
        _resenc_m(config)
    return config


def _resenc_m(config: ConfigDict) -> None:
    """nnU-Net's recipe for a patch of 96^3: 63 million parameters, 250,000 steps."""
    config.preparation.spacing = (1.5, 1.5, 1.5)  # mm

    config.model = ConfigDict()
    config.model.name = "resenc_unet"
    config.model.preset = "M"
    config.model.dtype = "auto"
    config.model.remat = False

    config.training.patch_size = (96, 96, 96)
    config.training.batch_size = 2
    config.training.steps = 1000 * 250
    config.training.foreground = 1 / 3
    config.training.tumor_share = None  # foreground crops take all classes alike
    config.training.deep_supervision = True
    config.training.batch_dice = False
    config.training.absent_dice = True
    config.training.cross_entropy_weight = 1.0
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.01
    config.training.momentum = 0.99
    config.training.weight_decay = 3e-5
    config.training.clip = 12.0
    config.training.schedule = "poly"
    config.training.epoch_steps = 250
    config.training.power = 0.9
    config.training.save_every = 2500
    config.training.log_every = 250
    config.training.loader_threads = 8

    config.augmentation = ConfigDict(augmentation.DEFAULT)
    config.inference.mirror_axes = (0, 1, 2)
