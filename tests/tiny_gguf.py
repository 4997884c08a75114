"""Tiny GGUFs of random weights, written with the package gguf by llama.cpp's own rules, to compare readers with."""

import gguf
import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

# configuration keys of llama.cpp: attribute of a transformers configuration, writer's method
KEYS = {
    "hidden_size": "add_embedding_length", "num_hidden_layers": "add_block_count",
    "intermediate_size": "add_feed_forward_length", "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv", "max_position_embeddings": "add_context_length",
    "rms_norm_eps": "add_layer_norm_rms_eps",
}  # fmt: skip


def permuted(weight, heads):
    "Rows of a query or key projection as llama.cpp keeps them: the halves of a head interleaved."
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model, architecture):
    "Name in the file and float32 values of every tensor of a transformers model."
    config, found = model.config, {}
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = {id(model.get_input_embeddings().weight)}
    for name, value in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and id(value) in tied:
            continue
        value = value.detach().float().numpy()
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            parts = {"ffn_gate_exps": value[:, :half], "ffn_up_exps": value[:, half:]}
            found |= {f"blk.{name.split('.')[2]}.{part}.weight": v for part, v in parts.items()}
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        stem, _, leaf = name.rpartition(".")
        target = f"{names.get_name(stem)}.{leaf}"
        if architecture == "llama" and (".attn_q." in target or ".attn_k." in target):
            value = permuted(value, config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads)
        if architecture.startswith(("gemma", "nemotron")) and target.endswith("norm.weight"):
            value = value + 1
        if target.endswith("ffn_gate_inp_shexp.weight"):
            value = value[0]
        found[target] = value
    return found


def write(path, model, architecture, type="Q8_0", keys=(), more=(), kind="gpt2", change=lambda tensors: tensors):
    "Write a model; `keys`: (key, value, GGUF type), `more`: tensors beside the model's."
    config, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    for attribute, method in KEYS.items():
        if getattr(config, attribute, None) is not None:
            getattr(writer, method)(getattr(config, attribute))
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float((rope.get("full_attention") or rope).get("rope_theta", 10000.0)))
    for key, value, kind_of_value in keys:
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType[kind_of_value])
    size = config.vocab_size
    alphabet = list(bytes_to_unicode().values()) if kind == "gpt2" else ["<unk>", *map(chr, range(33, 127))]
    tokens = [*alphabet, "Ġt", "he", *(f"<{i}>" for i in range(size))][:size]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges(["Ġ t", "h e"])
    if kind != "gpt2":
        writer.add_token_scores([0.0] * size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    quantized = gguf.GGMLQuantizationType[type]
    for name, value in change({**tensors_of(model, architecture), **dict(more)}).items():
        value = np.ascontiguousarray(value, np.float32)
        if value.ndim > 1 and type != "F32":
            writer.add_tensor(name, gguf.quantize(value, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, value)
    for part in "header", "kv_data", "tensors":
        getattr(writer, f"write_{part}_to_file")()
    writer.close()


def model(kind, seed=0, **settings):
    "A small transformers model of random weights."
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    base = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=320, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
    config = CONFIG_MAPPING[kind](**{**base, **settings})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 + ("norm" in name))
    return made.eval()
