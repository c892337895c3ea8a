"""The rows of benchmarks.synthesis that are training steps."""

import numpy as np

from benchmarks.untrained import (
    NETWORKS,
    ORGANS,
    RADIUS_MM,
    SPACING,
    WINDOW,
    Row,
    scene,
    untrained_autoencoder,
    untrained_diffusion,
)


def training(synthesizer: str) -> Row:
    """Returns the row of a step of ResEncM, with tumours made in it by the synthesizer, or none."""
    import jax

    from configs import segmentation
    from tumorjax import parallel
    from tumorjax.data import augmentation
    from tumorjax.synthesis import online
    from tumorjax.training import segmenter

    config = segmentation.get_config("resenc_m")
    config.task.classes = {"liver": ("liver",), "liver_lesion": ("liver_lesion",)}
    config.preparation.spacing = SPACING
    mesh = parallel.make_mesh(config.mesh)
    transform = None
    if synthesizer:
        trained = untrained_diffusion(*NETWORKS["tumorjax"]) if synthesizer == "diffusion" else None
        chosen = {"synthesizer": synthesizer, "spacing": SPACING, "window": WINDOW}
        transform = online.make(trained, config.task.classes, chosen, mesh)
    made = segmenter.make_segmenter(config, mesh, transform)
    # Augmentation cuts patches out of larger crops.
    size = augmentation.source_patch(tuple(config.training.patch_size), config.augmentation)[0]
    hu, organ, _ = scene(size)
    low, high = WINDOW
    batch = {
        "image": np.stack([np.clip((hu - low) / (high - low), 0, 1)[..., None]] * 2),
        "label": np.stack([organ.astype(np.uint8)] * 2),
    }
    if transform is not None:
        batch["implant"] = np.ones(2, bool)
    batch = made.put(batch)
    if transform is not None:
        # Not every place that is drawn will do; what is measured are two tumours.
        _, label = transform(jax.random.key(0), *(batch[k] for k in ("image", "label", "implant")))
        tumors = (np.asarray(label) == 2).any(axis=(1, 2, 3))
        if not tumors.all():
            raise RuntimeError(f"{tumors.sum()} of two patches got a tumour")
    state = [made.init(0)]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]["parameters"]))

    def run() -> None:
        state[0], scalars = made.step(state[0], batch)
        jax.block_until_ready((state, scalars))

    return Row(run, parameters, {})


def paper_autoencoder(discriminators: bool) -> Row:
    """Returns the row of DiffTumor's stage 1, with its discriminators or before they come in."""
    import jax
    import jax.numpy as jnp

    from configs import autoencoder
    from tumorjax import parallel
    from tumorjax.synthesis import autoencoder_step

    config = autoencoder.get_config("paper")
    mesh = parallel.make_mesh(config.mesh)
    trainer = autoencoder_step.make_trainer(config, mesh)
    training = config.training
    image = np.random.default_rng(0).random(
        (training.batch_size, *training.patch_size, 1), np.float32
    )
    batch = parallel.put_batch(mesh, {"image": image})
    state = [trainer.init(0)]
    networks = [state[0]["parameters"], state[0]["discriminators"]]

    def run() -> None:
        state[0], scalars = trainer.step(state[0], batch)
        jax.block_until_ready((state, scalars))
        if discriminators:
            state[0]["step"] = jnp.maximum(state[0]["step"], training.adversarial_from)

    return Row(run, sum(leaf.size for leaf in jax.tree.leaves(networks)), {})


def paper_diffusion() -> Row:
    """Returns the row of DiffTumor's stage 2."""
    import jax

    from configs import diffusion
    from tumorjax import parallel
    from tumorjax.synthesis import diffusion_training

    config = diffusion.get_config("paper")
    mesh = parallel.make_mesh(config.mesh)
    encode, _, channels = untrained_autoencoder("difftumor")
    encode = jax.device_put(encode, parallel.replicated(mesh))
    trainer = diffusion_training.make_trainer(config, ORGANS[:1], channels, mesh)
    rows, shape = config.training.batch_size, tuple(config.training.crop)
    tumor = np.broadcast_to(scene(shape[0])[2], (rows, *shape))
    image = np.random.default_rng(0).random((rows, *shape, 1), np.float32)
    batch = parallel.put_batch(
        mesh,
        {
            "image": image,
            "mask": np.array(tumor),
            "organ": np.zeros(rows, np.int32),
            "radius_mm": np.full(rows, RADIUS_MM, np.float32),
        },
    )
    state = [trainer.init(0)]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]["parameters"]))

    def run() -> None:
        state[0], scalars = trainer.step(state[0], batch, encode)
        jax.block_until_ready((state, scalars))

    return Row(run, parameters, {})
