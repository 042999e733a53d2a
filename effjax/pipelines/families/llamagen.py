"""LlamaGen: images of classes, token by token; two files and an index that names them."""

from effjax.pipelines.family import CodesFamily

FAMILIES = (
    CodesFamily(
        name="LlamaGenPipeline",
        pipeline="NextTokenPipeline",
        models=("LlamaGen",),
        guidance=2.0,
        top_k=0,
        top_p=1.0,
    ),
)
