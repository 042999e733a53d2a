"""Language models, in transformers' layout or as `TextPipeline.save` writes them."""

from effjax.pipelines.family import TEXT, PipelineFamily

FAMILIES = (
    PipelineFamily(
        name=TEXT,
        pipeline=TEXT,
        models=("Llama", "MoELlama", "DeepSeek"),
        model="model",
        tokenizers=("tokenizer",),
    ),
)
