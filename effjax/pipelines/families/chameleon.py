"""Chameleon and Anole: images of prompts, among whose tokens are the codes, token by token.

Defaults are those of the code that was released with them.
"""

from effjax.pipelines.family import CodesFamily

FAMILIES = (
    CodesFamily(
        name="ChameleonPipeline",
        pipeline="PromptTokenPipeline",
        models=("Chameleon",),
        architectures=("ChameleonForConditionalGeneration",),
        tokenizers=("tokenizer",),
        vae_part="vqmodel",
        vae_file="vqgan.ckpt",
        guidance=3.0,
        top_k=0,
        top_p=0.9,
        temperature=0.7,
    ),
)
