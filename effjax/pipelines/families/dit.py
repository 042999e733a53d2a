"""DiT: images of classes, [cond, uncond]."""

from effjax.guidance import Guidance
from effjax.pipelines.family import DiffusionFamily

FAMILIES = (
    DiffusionFamily(
        name="DiTPipeline",
        pipeline="ClassConditionalPipeline",
        models=("DiT",),
        steps=50,
        guidance=4.0,
        arrangement=Guidance(),
    ),
)
