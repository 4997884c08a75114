"""Ask vLLM's own functions which modules they would quantize, which shapes its CPU kernel takes, what
its classes fuse; JSON in, JSON out."""
import json
import sys
from types import SimpleNamespace


def asks_gptq(config, name, fused):
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override
    return get_dynamic_override(SimpleNamespace(dynamic=config["dynamic"]), name) is not False


def asks_awq(config, name, fused):
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
    return not is_layer_skipped(name, config["modules_to_not_convert"], fused, match_mode="substring")


def asks_compressed_tensors(config, name, fused):
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    if name.endswith(".experts"): name += ".0.gate_proj"      # what its MoE method looks up
    return not should_ignore_layer(name, config["ignore"], fused)


def kernel_takes(out_features, in_features, group):
    import torch
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types
    shape = in_features, out_features
    try:
        choose_mp_linear_kernel(MPLinearLayerConfig(shape, shape, scalar_types.uint4, torch.float16, group, True))
    except ValueError: return False
    return True


def table_of(architecture):
    from vllm.model_executor.models.registry import ModelRegistry
    return ModelRegistry._try_load_model_cls(architecture).packed_modules_mapping


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    ask = {"gptq": asks_gptq, "awq": asks_awq, "compressed-tensors": asks_compressed_tensors}
    quantized = {method: {name: ask[method](config, name, asked["fused"]) for name in asked["names"]}
                 for method, config in asked["configs"].items()}
    print("ANSWER" + json.dumps(dict(quantized=quantized, kernel=[kernel_takes(*shape) for shape in asked["shapes"]],
                                     tables={name: table_of(name) for name in asked["architectures"]})))
