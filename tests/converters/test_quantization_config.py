"""Options of quantized checkpoints that are not read, each named with what is."""

import pytest

import converters
from tests.converters.formats import AWQ, TOKENS, compressed, gptq, torchao, write


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes', which is not .*model.dequantize\(\)"),
        ({"quant_method": "mxfp4"}, r"'mxfp4', which is not read .*Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "gguf"}, r"'gguf', which is not read .*gguf_file="),
        ({"quant_method": "exl3"}, "'exl3'.*with the library that made it, or .* llm-compressor"),
        ([4], r"must be an object, got \[4\]"),
        ({"quant_method": "torchao"}, "quant_type=None"),
        (torchao("Int4WeightOnlyConfig"), r"quant_type\.default\._type='Int4WeightOnlyConfig' .on"),
        (torchao("Int8WeightOnlyConfig", 1), r"quant_type\.default\._version=1 \(only 2\)"),
        (
            torchao("Int8WeightOnlyConfig", granularity={"_type": "PerTensor"}),
            r"quant_type\.default\._data\.granularity\._type='PerTensor'.*'PerGroup'",
        ),
        (
            torchao("IntxWeightOnlyConfig", weight_dtype={"_data": "int1"}),
            r"quant_type\.default\._data\.weight_dtype='int1'",
        ),
        (
            torchao("Int8DynamicActivationIntxWeightConfig", act_mapping_type="SYMMETRIC"),
            r"_data\.act_mapping_type='SYMMETRIC' \(only 'ASYMMETRIC'\)",
        ),
        (
            torchao("IntxWeightOnlyConfig", intx_packing_format="OPAQUE_ATEN_KLEIDIAI"),
            r"_data\.intx_packing_format='OPAQUE_ATEN_KLEIDIAI' \(only 'UNPACKED_TO_INT8'\)",
        ),
        (torchao("Int8DynamicActivationInt8WeightConfig", reduce_range=True), "reduce_range=True"),
        (torchao("Int8WeightOnlyConfig", granularity=[{}, {}]), r"granularity=\[{}, {}\] \(only"),
        (gptq(5), r"bits=5 \(only 2, 3, 4, 8\)"),
        (gptq(4, pack_dtype="int64"), "pack_dtype='int64'"),
        (gptq(4, dynamic=["a"]), r"dynamic=\['a'\] \(only an object"),
        (gptq(4, dynamic={"+:a": 3}), r"dynamic: \+:a=3 \(only an object"),
        (gptq(4, dynamic={"-:[": {}}), r"dynamic: -:\[: '\[' is no regular expression"),
        (gptq(4, dynamic={"a": {"bits": 5}}), r"gptq cannot be read: dynamic: a: bits=5 \(only 2"),
        (gptq(4, 0), "group_size=0"),
        (gptq(4, checkpoint_format="marlin"), "checkpoint_format='marlin'.*'gptq', 'gptq_v2'"),
        (AWQ | {"version": "gemv", "bits": 3}, r"version='gemv' \(only 'gemm'\); bits=3"),
        (compressed("nvfp4-pack-quantized", 4), r"NVFP4 is not read: .*\(dequantize=True\)"),
        (compressed("mxfp4-pack-quantized", 4), "MXFP4 is not read"),
        (compressed("marlin-24", 4), "format='marlin-24'.*'pack-quantized'"),
        (compressed("pack-quantized", 3), r"group_0: weights\.num_bits=3 \(only 4, 8\)"),
        (compressed("int-quantized", 8, targets=["re:("]), r"group_0: '\(' is no regular"),
        (
            compressed("int-quantized", 8, inputs=TOKENS | {"dynamic": False}),
            r"input_activations\.dynamic=False",
        ),
        (compressed("pack-quantized", 4) | {"transform_config": {"a": 1}}, "transform_config"),
        (compressed("pack-quantized", 4) | {"config_groups": {"g": 3}}, r"g=3 \(only an object"),
        ({"quant_method": "compressed-tensors"}, "it has no config_groups"),
    ],
)
def test_what_cannot_be_read_is_named(t5, tmp_path, config, message):
    with pytest.raises(ValueError, match=f"quantization_config.*{message}"):
        converters.from_pretrained(write(t5, tmp_path / "q", config, {}))
