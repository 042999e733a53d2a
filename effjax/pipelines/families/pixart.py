"""PixArt-Sigma and PixArt-alpha: images of prompts in lower case, read by T5; [uncond, cond]."""

import dataclasses

from effjax.guidance import Guidance
from effjax.models.pixart import PromptEmbeddings
from effjax.pipelines.family import DiffusionFamily, TextEncoder, lower_case

_T5 = TextEncoder(max_length=300, longest=300, read=PromptEmbeddings, channels="caption_channels")

_SIGMA = DiffusionFamily(
    name="PixArtSigmaPipeline",
    pipeline="TextToImagePipeline",
    models=("PixArt",),
    text_encoders=(_T5,),
    steps=20,
    guidance=4.5,
    arrangement=Guidance(("uncond", "cond")),
    clean=lower_case,
)

_ALPHA = dataclasses.replace(
    _SIGMA,
    name="PixArtAlphaPipeline",
    text_encoders=(dataclasses.replace(_T5, max_length=120, longest=120),),
)

FAMILIES = (_SIGMA, _ALPHA)
