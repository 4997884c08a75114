"A model in memory gets what the same recipe gives a checkpoint, and refuses what the recipe refuses."
import gc
import inspect
import re
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml

from llmquant import quantize
from llmquant.checkpoint.edited_source import with_edits
from llmquant.core.errors import UsageError
from llmquant.core.options import Option
from llmquant.core.outlier_suppression_registry import BaseOutlierSuppressor, OutlierSuppressionRegistry
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.quantizer_registry import BaseQuantizer, QuantizerRegistry
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.utils.config import resolve
from llmquant.utils.recipe_keys import KEYS


def linears(model): return {m.checkpoint_name: m for m in model.modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("section", [{"activations": {"bits": 8}}, {"activations": 8, "bits": 8}, {"bits": 3}])
def test_what_is_implied_is_implied_in_memory_too(section, tmp_path):
    "The same codes through both entry points when the call says neither bits nor group_size."
    from transformers import AutoModelForCausalLM
    tiny_tokenizer.save(tiny.make("llama", tmp_path / "base"))
    config = {"quantization": section}
    quantize(tmp_path / "base", tmp_path / "out", config=config)
    report = yaml.safe_load((tmp_path / "out" / "quantization_report.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    found = linears(QuantizerRegistry.get("minmax")().quantize(model, config=config))
    assert {name: m.quantized_weight().digest() for name, m in found.items()} == report["verification"]["digests"]


def test_weights_of_four_bits_under_activations_are_asked_for():
    "W4A8 stays possible in memory, where it can be simulated, when the call says so."
    model = QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), bits=4, group_size=32,
                                                       config={"quantization": {"activations": {"bits": 8}}})
    assert {(m.bits, m.group_size, m.scheme.activations.bits) for m in linears(model).values()} == {(4, 32, 8)}


@pytest.mark.parametrize("names", [["rotation", "rotation"], ["none", "rotation"], "none,rotation", "[]", "smooth"])
def test_suppressors_are_refused_with_the_recipes_sentence(names):
    "Duplicates, `none` beside a name, brackets and unknown names."
    section = {"quantization": {"outlier_suppression": names}}
    with pytest.raises(UsageError) as recipe: resolve(config=section)
    with pytest.raises(UsageError) as memory:
        QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), bits=4, group_size=32, config=section)
    assert str(recipe.value) == str(memory.value)
    assert str(memory.value).startswith("quantization.outlier_suppression: ")


HINTS = {"activation_bits": (8, "did you mean the keyword 'activations'?"),
         "bitz": (4, "did you mean the keyword 'bits'?"),
         "calibratoin": ({"num_samples": 4}, """did you mean config={"calibration": ...}?"""),
         "calibration": ({"num_sample": 4}, """did you mean config={"calibration": {"num_samples": ...}}?""")}


@pytest.mark.parametrize("keyword", HINTS)
def test_a_wrong_keyword_is_told_the_right_one(keyword):
    "A Python call is answered in keywords, not in paths."
    value, said = HINTS[keyword]
    with pytest.raises(UsageError) as caught: quantize("m", "o", **{keyword: value})
    assert said in str(caught.value)


def test_a_call_gives_a_whole_section():
    found = resolve({"calibration": {"num_samples": 4}}, config={"calibration": {"batch_size": 2}}, origin="call")
    assert (found.calibration["num_samples"], found.calibration["batch_size"]) == (4, 2)
    assert found.origins["calibration.num_samples"].startswith("call")


def test_a_call_gives_keys_of_activations():
    "A dictionary as a keyword is merged with the document's section, and a width is still a width."
    config = {"quantization": {"activations": {"bits": 4, "symmetric": False}}}
    found = resolve({"activations": {"dynamic": False}}, config=config, origin="call")
    assert str(found.activations) == "A4 tensor static asym" and found.origins["activations"] == "call over config"
    for wrong, said in ((99, "quantization.activations: 99"), ({"bits": 1}, "quantization.activations.bits: 1")):
        with pytest.raises(UsageError, match=f"^{said} is out of range"): resolve({"activations": wrong}, origin="call")


def test_the_report_of_an_export_from_memory_names_suppressors(tmp_path):
    from llmquant.models.llama_adapter import LlamaAdapter
    model, ids = tiny.build("llama", torch.float16), torch.randint(3, 500, (4, 64))
    config = {"quantization": {"outlier_suppression": ["rotation", "smooth_quant"], "activations": 8,
                               "rotation": {"seed": 3}, "smooth_quant": {"alpha": 0.6}}}
    model = QuantizerRegistry.get("minmax")().quantize(model, calibration_data=ids, config=config)
    LlamaAdapter().save_quantized(model, str(tmp_path / "out"))
    said = yaml.safe_load((tmp_path / "out" / "quantization_report.yaml").read_text())["outlier_suppression"]
    assert list(said) == ["rotation", "smooth_quant"] and said["rotation"]["seed"] == 3
    assert said["rotation"]["residual"] == "Hadamard 128" and said["smooth_quant"]["alpha"] == 0.6


@pytest.mark.parametrize("first", [{"quantization": {"activations": {"bits": 8}, "minmax": {"symmetric": True}}},
                                   {"symmetric": True, "dynamic_range": "mse"}, {"quantization": {"bits": 3}}],
                         ids=["activations", "options", "bits"])
def test_a_quantizer_keeps_nothing_of_a_call(first):
    "The second call of one quantizer gives what the first call of another one gives."
    used, fresh = (QuantizerRegistry.get("minmax")() for _ in range(2))
    before = dict(vars(used))
    used.quantize(tiny.build("llama"), group_size=-1 if "activations" in str(first) else 32, config=first)
    assert vars(used) == before
    digests = [{name: m.quantized_weight().digest() for name, m in
                linears(quantizer.quantize(tiny.build("llama"), bits=4, group_size=32)).items()}
               for quantizer in (used, fresh)]
    assert digests[0] == digests[1]


def test_what_was_configured_before_the_call_holds_for_it():
    "`configure` is no call: what it set stays, and a call's options stand in for it once."
    quantizer = QuantizerRegistry.get("minmax")().configure({"symmetric": True})
    calls = [quantizer.quantize(tiny.build("llama"), bits=4, group_size=32, config=config)
             for config in (None, {"symmetric": False}, None)]
    assert [next(iter(linears(model).values())).scheme.symmetric for model in calls] == [True, False, True]


ODD = [{"model": {"device_map": "banana"}}, {"model": {"trust_remote_code": 1}}, {"model": {"torch_dtype": "int8"}},
       {"model": "cpu"}, {"output": {"format": "xyz"}}, {"output": {"max_shard_size": "much"}},
       {"output": {"save_format": "bin"}}, {"output": {"overwrite": "yes"}}, {"output": ["format"]},
       {"quantization": {"layer_wise": 3}}, {"quantization": {"bits": "four"}}, {"quantization": {"group_size": -7}},
       {"quantization": {"gptq": {"dampening": 1}}}, {"quantization": {"smooth_quant": {"alpha": 1.5}}},
       {"quantization": {"hqq": [1]}}, {"quantization": {"minmax": {"symmetric": "no"}}},
       {"quantization": {"symetric": True}}, {"quantization": [4]}, {"quantization": {"overrides": "all"}},
       {"quantisation": {"bits": 4}, "quantization": {}}, {"quantization": {"bits": True}}, {"quantization": {"bits": 4.0}},
       {"quantization": {"seed": -1}}, {"quantization": {"activations": {"bits": 9}}}, {"calibration": {"num_samples": "4"}},
       {"quantization": {"overrides": [{"match": ".*", "bits": "4"}]}}, {"calibration": {"dataset": [{"dataset": "a", "wait": 1}]}},
       {"calibration": {"dataset": [{"dataset": "a", "weight": 0}]}}]


def from_file(config, folder, model=None):
    (folder / "r.yaml").write_text(yaml.safe_dump(config))
    resolve(config_path=folder / "r.yaml")


ENTRY_POINTS = {"file": from_file, "path": lambda config, folder, model: quantize("m", folder / "o", config=config),
                "model": lambda config, folder, model: QuantizerRegistry.get("minmax")().quantize(model, config=config)}


@pytest.fixture(scope="module")
def untouched(): return tiny.build("llama", layers=1)


def complaint(entry, config, folder, model):
    "What an entry point says of a wrong recipe, without the file's name and line."
    with pytest.raises(UsageError) as caught: ENTRY_POINTS[entry](config, folder, model)
    assert not linears(model)
    return re.sub(r"\S*r\.yaml:(\d+: )?", "", str(caught.value))


@pytest.mark.parametrize("config", ODD, ids=str)
def test_odd_values_are_refused_with_the_recipes_sentence(config, tmp_path, untouched):
    "In a file, for a path and for a model in memory."
    said = {complaint(entry, config, tmp_path, untouched) for entry in ENTRY_POINTS}
    assert len(said) == 1, said


UNUSED = {"hqq": ({"lp_norm": 0.5}, "hqq is not in use (method: minmax); use method hqq, or leave it out"),
          "smooth_quant": ({"alpha": 0.5}, "smooth_quant is not in use (outlier_suppression: none); "
                                           "use outlier_suppression smooth_quant, or leave it out")}


@pytest.mark.parametrize("name", UNUSED)
def test_options_of_what_is_not_in_use(name, tmp_path, untouched):
    "They would be dropped without a word: refused wherever they are given for this run; a file may hold them."
    options, said = UNUSED[name]
    (key, value), config = *options.items(), {"quantization": {name: options}}
    for entry in ("path", "model"):
        assert complaint(entry, config, tmp_path, untouched) == f"quantization.{name}.{key}: {said}"
    with pytest.raises(UsageError, match=re.escape(f"quantization.{name}.{key}: {said}")):
        quantize("m", tmp_path / "o", **{name: options})
    with pytest.raises(UsageError, match=re.escape(f"--set quantization.{name}.{key}: {said.partition(';')[0]}")):
        resolve({f"quantization.{name}.{key}": value})
    from_file(config, tmp_path)


OTHER = {"device_map": "cpu", "max_memory": "1GB", "format": "gptq", "container": "dense", "max_shard_size": "1GB"}


@pytest.mark.parametrize("path", [key.path for key in KEYS if key.path and not key.in_memory])
def test_keys_about_files_are_refused_in_memory(path, untouched):
    "Unless they say what is so without them, as the guide's files do."
    key = next(key for key in KEYS if key.path == path)
    section, _, name = path.partition(".")
    call = lambda value: resolve(config={section: {name: value}}, origin="call", quantizer=QuantizerRegistry.get("minmax")())
    call(key.default)
    value = OTHER.get(key.name, not key.default if key.type is bool else None)
    if value is None or key.name == "save_quantization_config": return  # one legal value only
    resolve(config={section: {name: value}})
    with pytest.raises(UsageError, match=f"^{path} has no effect on a model in memory"):
        QuantizerRegistry.get("minmax")().quantize(untouched, config={section: {name: value}})
    assert not linears(untouched)


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_file_means_the_same_in_memory(file):
    document, plain = yaml.safe_load(file.read_text()), resolve(config_path=file)
    memory = resolve(config=document, origin="call", quantizer=QuantizerRegistry.get(plain.method)())
    assert {**vars(memory), "origins": 0} == {**vars(plain), "origins": 0}


def test_layer_wise_alone_is_told_that_it_has_no_effect(tmp_path, untouched, caplog):
    "Given for this run it is refused, and in a file the run says so."
    said = "has no effect without layers: minmax quantizes all of them either way"
    typed = f"quantization.layer_wise {said}; name layers such as 0,1,4-6, or leave it out"
    config = {"quantization": {"layer_wise": True}}
    for entry in ("path", "model"): assert complaint(entry, config, tmp_path, untouched) == typed
    with pytest.raises(UsageError, match=re.escape(typed)): quantize("m", tmp_path / "o", layer_wise=True)
    with pytest.raises(UsageError, match=re.escape(typed)):
        QuantizerRegistry.get("minmax")().quantize(untouched, layer_wise=True)
    with pytest.raises(UsageError, match=f"^--layer-wise {said}"): resolve({"layer_wise": True})
    with caplog.at_level("INFO", "llmquant"): from_file(config, tmp_path)
    assert [message.partition(": ")[2] for message in caplog.messages] == [f"quantization.layer_wise {said}"]


@pytest.mark.parametrize("given", [{"target_layers": [1]}, {"target_layers": (n for n in [1]), "layer_wise": True},
                                   {"config": {"quantization": {"layers": "1"}}}], ids=["call", "both", "document"])
def test_layers_that_are_named_are_the_only_ones(given):
    found = linears(QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), group_size=32, **given))
    assert found and {name.split(".")[2] for name in found} == {"1"}


def test_call_over_document_over_configured_over_default():
    quantizer = QuantizerRegistry.get("minmax")().configure({"symmetric": True, "dynamic_range": "mse"})
    config = {"quantization": {"bits": 3, "group_size": 64, "minmax": {"dynamic_range": "minmax"}}}
    found = resolve({"bits": 8}, config=config, origin="call", quantizer=quantizer)
    assert (found.bits, found.group_size, found.method) == (8, 64, "minmax")
    assert (found.options["symmetric"], found.options["dynamic_range"], found.options["per_channel"]) == (True, "minmax", False)
    names = "bits", "group_size", "method", "options.symmetric", "options.dynamic_range", "options.per_channel"
    assert [found.origins[name] for name in names] == ["call", "config", "call", "configured", "config", "default"]


def test_a_document_for_another_method_is_refused():
    with pytest.raises(UsageError, match="^quantization.method: 'hqq', and the quantizer is 'minmax'; make them agree"):
        QuantizerRegistry.get("minmax")().quantize(tiny.build("llama", layers=1), config={"quantization": {"method": "hqq"}})


class Seen(Exception): pass


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    path = tiny.make("llama", tmp_path_factory.mktemp("model") / "base")
    tiny_tokenizer.save(path)
    return path


@pytest.mark.parametrize("config", [{}, {"quantization": {"seed": 7}}, {"model": {"trust_remote_code": True}},
                                    {"quantization": {"seed": 7}, "calibration": {"seed": 3, "num_samples": 5, "max_length": 9}}],
                         ids=["defaults", "seed", "trust", "all"])
def test_both_entry_points_read_the_same_calibration_data(config, with_tokenizer, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from llmquant.calibration import data
    asked, signature = [], inspect.signature(data.load_calibration)

    def load(*given, **more):
        asked.append(signature.bind(*given, **more).arguments)
        raise Seen
    monkeypatch.setattr(data, "load_calibration", load)
    model = AutoModelForCausalLM.from_pretrained(with_tokenizer, dtype="auto")
    with pytest.raises(Seen): quantize(with_tokenizer, tmp_path / "out", "gptq", config=config, group_size=32)
    with pytest.raises(Seen): QuantizerRegistry.get("gptq")().quantize(model, group_size=32, config=config)
    path, memory = ({name: value for name, value in one.items() if name not in ("generate", "tokenizer_path")} for one in asked)
    assert path == memory
    if config: return
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert (path["num_samples"], path["seed"], path["column"]) == tuple(defaults[n] for n in ("num_samples", "seed", "column"))
    assert path["max_length"] == min(defaults["max_length"], model.config.max_position_embeddings)


class Mine(BaseQuantizer):
    name, options = "mine", (Option("factor", float, 1.0, minimum=0.1),)
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight * self.settings["factor"], scheme)


@pytest.mark.parametrize("config", [{"factor": 2.0}, {"quantization": {"factor": 2.0}}, {"quantization": {"mine": {"factor": 2.0}}}])
def test_a_class_that_is_not_registered_has_options_too(config):
    plain, twice = (linears(Mine().quantize(tiny.build("llama", layers=1), 8, -1, config=given)) for given in (None, config))
    for name in plain: torch.testing.assert_close(twice[name].dequantize(), 2 * plain[name].dequantize(), rtol=0.01, atol=1e-3)
    with pytest.raises(UsageError, match="^quantization.mine.facter: unknown key, not an option of mine .symmetric, factor.; "
                                         "did you mean 'quantization.mine.factor'"):
        Mine().quantize(tiny.build("llama", layers=1), 8, -1, config={"facter": 2.0})


class Transposing(BaseOutlierSuppressor):
    "Reverses the order of the MLP's inner channels; all it defines is `transform`."
    def transform(self, source, adapter):
        edits = {name: (lambda read, name=name, axis=int("down" in name): read(name).flip(axis))
                 for name in source.tensors if ".mlp." in name}
        return with_edits(source, edits)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_suppressor_that_only_transforms_works_in_memory_as_on_a_folder(scope, tmp_path):
    "The same codes, and the model's function in float stays."
    from transformers import AutoModelForCausalLM
    OutlierSuppressionRegistry.register("flip", type("Flip", (Transposing,), {"scope": scope}))
    try:
        tiny.make("llama", tmp_path / "base")
        config = {"quantization": {"outlier_suppression": "flip"}}
        report = quantize(tmp_path / "base", tmp_path / "out", bits=4, group_size=32, config=config)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        ids = torch.randint(3, 500, (1, 16))
        logits = model(ids).logits
        OutlierSuppressionRegistry.get("flip")().apply(model)
        assert (model(ids).logits - logits).norm() < 1e-5 * logits.norm()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
        found = linears(QuantizerRegistry.get("minmax")().quantize(model, bits=4, group_size=32, config=config))
        assert {name: m.quantized_weight().digest() for name, m in found.items()} == report["verification"]["digests"]
        plain = quantize(tmp_path / "base", tmp_path / "plain", bits=4, group_size=32)["verification"]["digests"]
        assert {n for n, d in plain.items() if d != report["verification"]["digests"][n]} == {n for n in plain if ".mlp." in n}
    finally: OutlierSuppressionRegistry._registry.classes.pop("flip")


def live():
    "Bytes of all tensors that somebody holds, each storage once."
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


class Mixing(BaseOutlierSuppressor):
    "Adds gate to up and takes it away again: edits that read two matrices of their block, and are measured."
    name, scope, peak = "mixing", "model", 0
    def measured(self, edit):
        def wrapped(read):
            value = edit(read)
            self.peak = max(self.peak, live())
            return value
        return wrapped
    def transform(self, source, adapter):
        edits = {}
        for name in source.tensors:
            if not name.endswith("gate_proj.weight"): continue
            gate, up, down = (name.replace("gate", part) for part in ("gate", "up", "down"))
            edits[down] = self.measured(lambda read, down=down: read(down) * 2)
            edits[up] = self.measured(lambda read, gate=gate, up=up: read(up) / 2 + 0 * read(gate))
            edits[gate] = self.measured(lambda read, gate=gate, up=up: read(gate) + 0 * read(up))
        return with_edits(source, edits)


def test_a_suppressor_that_transforms_a_model_in_memory_copies_a_block_and_not_the_model():
    model, mixing = tiny.build("llama", torch.float32, layers=8), Mixing()
    old = {n: p.clone() for n, p in model.named_parameters() if "mlp" in n and ".3." in n}
    gc.collect()
    before, own = live(), sum(p.numel() * 4 for p in model.parameters())
    mixing.apply(model)
    assert own < mixing.peak - before + own < 1.4 * own # two blocks of 8 are compared, in float32
    for name, value in old.items():
        factor = {"gate": 1, "up": .5, "down": 2}[name.split(".")[-2].removesuffix("_proj")]
        assert torch.equal(model.get_parameter(name), factor * value)


def test_a_suppressor_of_the_model_that_edits_blocks_is_refused_when_it_is_registered():
    kind = type("Odd", (BaseOutlierSuppressor,), {"scope": "model", "apply_to_pair": lambda self, pair, view: None})
    with pytest.raises(UsageError, match="Odd has scope 'model' and defines neither transform nor apply"):
        OutlierSuppressionRegistry.register("odd", kind)


class Drawing(BaseQuantizer):
    "Moves weights by numbers of torch's own generator before it rounds them."
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight + .1 * torch.rand_like(weight), scheme)


def test_both_entry_points_seed_torchs_own_generator(tmp_path):
    "The same codes for the same seed, whatever was drawn before, and others for another."
    from transformers import AutoModelForCausalLM
    QuantizerRegistry.register("drawing", Drawing)
    try:
        tiny.make("llama", tmp_path / "base")
        report = quantize(tmp_path / "base", tmp_path / "out", method="drawing", bits=4, group_size=32, seed=7)

        def in_memory(seed):
            torch.rand(seed)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
            found = QuantizerRegistry.get("drawing")().quantize(model, 4, 32, config={"quantization": {"seed": seed}})
            return {name: m.quantized_weight().digest() for name, m in linears(found).items()}
        assert in_memory(7) == report["verification"]["digests"]
        assert not set(in_memory(8).values()) & set(report["verification"]["digests"].values())
    finally: QuantizerRegistry._registry.classes.pop("drawing")
