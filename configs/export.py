"""A network trained here, for nnU-Net: a model folder that nnU-Net's own programs predict with.

    python -m tumorjax.main --config=configs/export.py --config.checkpoint=runs/segmentation \
        --config.output=runs/nnunet_model
    nnUNetv2_predict_from_modelfolder -m runs/nnunet_model -f 0 -i imagesTs -o predictions

Needs PyTorch (the extra "torch"). Networks: resenc_unet, plain_unet. A label's value there is the
index of its class (dataset.json). The other way round, configs/prediction.py takes nnU-Net's model
folders as they are.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "export"
    config.checkpoint = ""  # folder of a cell or of a segmentation job
    config.step = placeholder(int)  # None: the newest checkpoint
    config.output = ""  # empty: WORKDIR/nnunet
    return config
