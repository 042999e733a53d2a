"""VAR: images of classes, scale by scale; two files and an index that names them."""

from effjax.pipelines.family import CodesFamily

FAMILIES = (
    CodesFamily(
        name="VARPipeline",
        pipeline="NextScalePipeline",
        models=("VAR",),
        refiner="refiner",
        guidance=1.5,
        top_k=900,
        top_p=0.96,
    ),
)
