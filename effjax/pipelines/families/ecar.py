"""ECAR: images of classes, stage by stage, of pixels or of the latents of a VAE."""

from effjax.pipelines.family import StageFamily

FAMILIES = (
    StageFamily(
        name="ECARPipeline",
        pipeline="NextStagePipeline",
        models=("ECAR",),
        steps=8,
        guidance=3.0,
    ),
)
