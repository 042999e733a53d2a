"""Janus: images of prompts that the language model reads itself, token by token."""

from effjax.pipelines.family import CodesFamily

FAMILIES = (
    CodesFamily(
        name="JanusPipeline",
        pipeline="PromptTokenPipeline",
        models=("Janus",),
        architectures=("JanusForConditionalGeneration",),
        tokenizers=("tokenizer",),
        vae_part="vqmodel",
        guidance=5.0,
        top_k=0,
        top_p=1.0,
    ),
)
