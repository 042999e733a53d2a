"""VAR: images of classes, scale by scale; two files and an index that names them.

Its students (Distilled Decoding) make all scales in a call or two.
"""

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
    CodesFamily(name="DistilledVARPipeline", pipeline="FewStepPipeline", models=("DistilledVAR",)),
)
