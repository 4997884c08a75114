"""`python test_framework.py`: the extension guide's checks, one line each; exit status 1 when one fails.

The guide's paths hold with `src` read as `llmquant`. Components of installed packages are checked like built-in ones.
With `--vllm` the last check has vLLM load an export under the name of its method, as the guide does.
"""
import argparse
import inspect
import json
import logging
import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from llmquant.core.model_registry import ModelRegistry
from llmquant.core.outlier_suppression_registry import OutlierSuppressionRegistry
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.evaluation.check_components import LLAMA_64, check_adapter, check_quantizer, check_suppressor, tiny_model
from llmquant.utils.config import resolve

ROOT = Path(__file__).parent
TREE = {  # the guide's tree, and the classes that it names
    "core.model_registry": ("ModelRegistry",), "core.quantizer_registry": ("QuantizerRegistry", "BaseQuantizer"),
    "core.outlier_suppression_registry": ("OutlierSuppressionRegistry", "BaseOutlierSuppressor"),
    "models.base_adapter": ("BaseHuggingFaceAdapter",), "models.llama_adapter": ("LlamaAdapter",),
    "models.qwen_adapter": ("QwenAdapter",), "models.deepseek_adapter": ("DeepSeekAdapter",),
    "quantizers.gptq_quantizer": ("GPTQQuantizer",), "quantizers.awq_quantizer": ("AWQQuantizer",),
    "quantizers.minmax_quantizer": ("MinMaxQuantizer",), "quantizers.hqq_quantizer": ("HQQQuantizer",),
    "outlier_suppression.smooth_quant": ("SmoothQuantSuppressor",),
    "outlier_suppression.outlier_suppression_v2": ("OutlierSuppressionV2",),
    "registry_init": ("register_quantizers", "register_model_adapters", "register_outlier_suppressors"),
    "utils.config": (), "utils.logging": ()}
NAMES = {QuantizerRegistry.list_quantizers: ("gptq", "awq", "minmax", "hqq"),
         ModelRegistry.list_adapters: ("default", "llama", "qwen", "deepseek"),
         OutlierSuppressionRegistry.list_suppressors: ("smooth_quant", "outlier_suppression_v2")}
QUANTIZE = "bits", "group_size", "layer_wise", "target_layers", "calibration_data", "config"
SIGNATURES = {  # as the guide writes and calls them
    "quantizers.hqq_quantizer.HQQQuantizer": {
        "quantize": ("model", *QUANTIZE), "_add_vllm_compatibility": ("model", "bits", "group_size"),
        "_verify_vllm_compatibility": ("model",), "get_supported_bits": (), "get_supported_group_sizes": ()},
    "models.deepseek_adapter.DeepSeekAdapter": {
        "get_layers": ("model",), "get_layer_by_name": ("model", "layer_name"), "get_model_info": (),
        "_save_vllm_config": ("model", "output_path")},
    "outlier_suppression.outlier_suppression_v2.OutlierSuppressionV2": {
        "apply": ("model", "calibration_data"), "_ensure_vllm_compatibility": ("model",), "get_supported_models": ()}}
FAMILIES = {"qwen": {"model_type": "qwen2"}, "gpt_neox": {"model_type": "gpt_neox"},
            "opt": {"model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64},
            "deepseek": {"model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64,
                         "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 32,
                         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
                         "topk_group": 1, "first_k_dense_replace": 1}}
LLAMA_128 = LLAMA_64 | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}  # heads as vLLM wants them
MARKS = ("qweight", "scales", "zeros", "bits", "group_size", "quantization_method")


def tree():
    "Every module of the guide's tree can be imported and has the guide's classes."
    for module, names in TREE.items():
        found = import_module(f"llmquant.{module}")
        for name in names: assert hasattr(found, name), f"llmquant.{module} has no {name}"
    return f"{len(TREE)} modules"


def registered():
    "The registries list what the guide registers."
    for listed, names in NAMES.items():
        for name in names: assert name in listed(), f"{name!r} is not among {', '.join(listed())}"
    return "; ".join(", ".join(listed()) for listed in NAMES)


def signatures():
    "Methods and hooks take what the guide's do."
    count = 0
    for path, methods in SIGNATURES.items():
        module, name = path.rsplit(".", 1)
        cls = getattr(import_module(f"llmquant.{module}"), name)
        for method, wanted in methods.items():
            taken = tuple(inspect.signature(getattr(cls, method)).parameters)[1:]
            assert taken == wanted, f"{name}.{method} takes {', '.join(taken)}; the guide's takes {', '.join(wanted)}"
            count += 1
    return f"{count} methods"


def configurations():
    "Every file in configs/ is a recipe."
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert {"hqq_config.yaml", "minmax_config.yaml"} <= {file.name for file in files}, "the guide's configs are missing"
    for file in files: resolve(config_path=file)
    return ", ".join(file.stem for file in files)


def attributes():
    "A quantized layer has the guide's attributes, the model a quantization_config."
    quantizer, model = QuantizerRegistry.get("hqq")(), tiny_model()
    quantizer.quantize(model, bits=4, group_size=32)
    quantizer._verify_vllm_compatibility(model)
    layer = ModelRegistry.get("llama")().get_layer_by_name(model, "model.layers.0.mlp.down_proj")
    for mark in MARKS: assert hasattr(layer, mark), f"a quantized layer has no {mark}"
    return ", ".join(MARKS)


def export(folder):
    "The guide's command writes the guide's vllm_config.json."
    model, out = folder / "model", folder / "minmax"
    tiny_model(LLAMA_128).half().save_pretrained(model)
    command = [sys.executable, str(ROOT / "quantize.py"), "--model-path", str(model), "--output-path", str(out),
               "--method", "minmax", "--bits", "8", "--group-size", "32", "--no-report", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    sections, config = (json.loads((out / name).read_text("utf-8")) for name in ("vllm_config.json", "config.json"))
    assert set(sections) == {"model", "tokenizer", "quantization"}, f"its sections are {', '.join(sections)}"
    assert config["quantization_config"] == sections["quantization"], "it is not what config.json has"
    return "quantize.py --method minmax --bits 8"


def served(folder):
    'vLLM loads it with `quantization="minmax"`, and computes what the codes say.'
    from llmquant.evaluation.verification import verify

    found = verify(folder / "minmax", quantization="minmax", require_vllm=True)["vllm"]
    return f"vLLM {found['version']}, mean KL {found['mean_kl']:.1e}"


def family(name):
    "A tiny config.json for an adapter, None where there is none: a package checks its own with `check_adapter`."
    if name in ("default", "llama"): return LLAMA_64
    return LLAMA_64 | FAMILIES[name] if name in FAMILIES else None


def refused(error):
    "What a registry found wrong with a package's class."
    raise error


def components():
    "Name and check of every registered component; None for an adapter whose family has no config.json here."
    for name in QuantizerRegistry.list_quantizers():
        yield f"method {name}", partial(check_quantizer, QuantizerRegistry.get(name))
    for name in ModelRegistry.list_adapters():
        config = family(name)
        yield f"adapter {name}", partial(check_adapter, ModelRegistry.get(name), config) if config else None
    for name in OutlierSuppressionRegistry.list_suppressors():
        yield f"suppressor {name}", partial(check_suppressor, OutlierSuppressionRegistry.get(name))
    for registry in (QuantizerRegistry._registry, ModelRegistry._registry, OutlierSuppressionRegistry._registry):
        for name, error in registry.broken.items(): yield f"{registry.kind} {name}", partial(refused, error)


def checks(folder, vllm):
    "Name and check of all that is checked."
    yield from {"modules and classes": tree, "registries": registered, "signatures": signatures,
                "configuration files": configurations, "layer attributes": attributes}.items()
    yield from components()
    yield "export", lambda: export(folder)
    if vllm: yield "vLLM", lambda: served(folder)


def main():
    "Run all, print a line for each."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", action="store_true", help="also let vLLM load an export, which takes a minute")
    given, failed = parser.parse_args(), 0
    logging.getLogger("llmquant").setLevel(logging.ERROR)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks(Path(folder), given.vllm):
            if check is None:
                print(f"left    {name}: call check_adapter with a small config.json of its family", flush=True)
                continue
            try:
                found = check()
                print(f"ok      {name}: {found if isinstance(found, str) else f'{len(found)} checks'}", flush=True)
            except Exception as error:  # whatever a component raises is its failure, and the others are still checked
                failed += 1
                print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
