"""SmoothQuant and Outlier Suppression+ on tiny models: the function stays, outliers shrink, mistakes are named."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from block_views import suppress, view_of, loop_over
from outliers import inject_outliers
from torch.utils.flop_counter import FlopCounterMode

from llmquant.core.errors import UsageError
from llmquant.core.outlier_suppression_registry import OutlierSuppressionRegistry
from llmquant.core.smoothing import SmoothingPair
from llmquant.outlier_suppression import site_trial
from llmquant.outlier_suppression.outlier_suppression_v2 import STRENGTHS, OutlierSuppressionV2, drawn, find_scale
from llmquant.outlier_suppression.smooth_quant import ALPHAS, SmoothQuantSuppressor, smoothing_factors
from llmquant.outlier_suppression.site_suppressor import sites_of
from llmquant.utils.config import resolve
from llmquant.sequential.activation_quantization import ActivationScheme

TOKENS = torch.randint(3, 512, (4, 48), generator=torch.Generator().manual_seed(0))
A8 = ActivationScheme()
LITE = {"deepseek_v2": dict(q_lora_rank=None), "deepseek_v3": dict()}
MAKERS = {"fixed": lambda: SmoothQuantSuppressor().configure({"alpha": .6}),
          "norms": lambda: SmoothQuantSuppressor().configure({"folding": "norms", "alpha": .5}),
          "auto": lambda: SmoothQuantSuppressor().configure({}),
          "plus": lambda: OutlierSuppressionV2().configure({})}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


def moved(after, before): return float((after - before).norm() / before.norm())


def facts_of(view, name): return view.notes[name]["pairs"]


def suppressed(kind, maker, tie=False, **changes):
    "A tiny model with outliers, what it computed before and after, and the views."
    model = inject_outliers(tiny.build(kind, torch.float32, tie=tie, **changes), [5, 33], 24.)
    before, suppressor = model(TOKENS).logits, MAKERS[maker]()
    if maker == "plus": suppressor._ensure_vllm_compatibility(model)
    views = suppress(model, suppressor, TOKENS, A8)
    return model, before, model(TOKENS).logits, views, suppressor


@pytest.mark.parametrize("tie", (False, True))
@pytest.mark.parametrize("kind", ("llama", "qwen2", "qwen3", "opt", "gpt_neox"))
@pytest.mark.parametrize("maker", MAKERS)
def test_logits_stay(kind, maker, tie):
    model, before, after, views, suppressor = suppressed(kind, maker, tie)
    assert 0 < moved(after, before) <= 1e-5
    for view in views:
        norms = [pair for pair in view.pairs if "norm" in pair.producer]
        pairs = norms if maker == "norms" else view.pairs
        assert set(facts_of(view, suppressor.name)) == {pair.producer for pair in pairs}
        assert view.edited == {name for pair in pairs for name in (pair.producer, *pair.consumers)}


@pytest.mark.parametrize("kind", ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"))
@pytest.mark.parametrize("maker", ("fixed", "plus"))
def test_mixtures_and_latent_attention(kind, maker):
    _, before, after, views, _ = suppressed(kind, maker, **LITE.get(kind, {}))
    assert moved(after, before) <= 1e-5 and all(view.edited for view in views)


@pytest.mark.parametrize("kind", ("llama", "qwen2", "opt", "gpt_neox"))
@pytest.mark.parametrize("maker", ("fixed", "plus"))
def test_statistics_follow(kind, maker):
    "The numbers that an edit leaves behind are those that measuring again finds."
    model, suppressor = inject_outliers(tiny.build(kind, torch.float32), [5], 24.), MAKERS[maker]()
    if maker == "plus": suppressor._ensure_vllm_compatibility(model)
    loop = loop_over(model, TOKENS)
    block, view = view_of(loop, 1, activations=A8)
    suppressor.apply_to_block(view)
    groups = loop.find_groups(1, block, {name: view.module(name) for name in view.plans})
    again = loop.measure(1, block, {names[0]: view.module(names[0]) for names in groups})
    for names in groups:
        told = view.stats[names[0]]
        assert all(view.stats[name] is told for name in names)
        for what in ("low", "high", "maxima"):
            seen = getattr(again[names[0]], what)
            off = (getattr(told, what) - seen).abs().max() / again[names[0]].maxima.max()
            assert off < 1e-3, (names[0], what)


def test_who_gets_a_shift():
    "Shift and scale where both sides have biases, scale only elsewhere, with the reason."
    expected = {"opt": {"self_attn_layer_norm", "final_layer_norm", "v_proj"}, "llama": {"v_proj"}, "qwen2": set(),
                "gpt_neox": {"input_layernorm", "post_attention_layernorm"}, "qwen3": set()}
    for kind, shifted in expected.items():
        for view in suppressed(kind, "plus")[3]:
            facts = facts_of(view, "outlier_suppression_v2")
            found = {name.rpartition(".")[2] for name, f in facts.items() if f["edit"] == "shift and scale"}
            assert found == shifted, kind
            assert all(("reason" in f) == (f["edit"] == "scale only") for f in facts.values())


def test_injected_outliers_change_nothing_but_activations():
    for kind in "llama", "opt":
        plain, loud = tiny.build(kind, torch.float32), inject_outliers(tiny.build(kind, torch.float32), [5, 33], 64.)
        assert moved(loud(TOKENS).logits, plain(TOKENS).logits) < 1e-6
        maxima = [view_of(loop_over(model, TOKENS))[1].stats for model in (plain, loud)]
        name = next(n for n in maxima[0] if n.endswith("q_proj"))
        ratio = maxima[1][name].maxima / maxima[0][name].maxima
        assert torch.allclose(ratio[[5, 33]], torch.tensor(64.)) and torch.allclose(ratio[:5], torch.ones(5), rtol=1e-4)


@pytest.mark.parametrize("kind", ("llama", "qwen3", "opt", "gpt_neox"))
@pytest.mark.parametrize("maker", MAKERS)
def test_outliers_stop_hurting(kind, maker):
    "The error that outliers bring is taken away again, seen by inputs of 6 bits on the block's output."
    errors = []
    for loud in False, True:
        model = tiny.build(kind, torch.float32)
        if loud: inject_outliers(model, [5, 33], 64.)
        loop = loop_over(model, TOKENS)
        _, view = view_of(loop, 1, activations=ActivationScheme(bits=6))
        reference = view.outputs(2)
        errors.append(view.error(reference, 2))
        if loud:
            MAKERS[maker]().apply_to_block(view)
            errors.append(view.error(reference, 2))
        loop.blocks.empty()
    quiet, hurt, healed = errors
    assert hurt > 4 * quiet and healed < 2 * quiet


def test_a_shift_helps_where_channels_lie_far_away():
    model = tiny.build("opt", torch.float32)
    for layer in model.model.decoder.layers: layer.self_attn_layer_norm.bias[[3, 50, 90]] += 25.
    found = {}
    for maker in "fixed", "plus":
        loop = loop_over(model, TOKENS)
        _, view = view_of(loop, 1, activations=ActivationScheme(bits=6))
        reference = view.outputs(2)
        before = view.error(reference, 2)
        MAKERS[maker]().apply_to_block(view)
        found[maker] = view.error(reference, 2) / before
        stats = view.stats["model.decoder.layers.1.self_attn.q_proj"]
        loop.blocks.empty()
    assert found["plus"] < .7 * found["fixed"] < .7
    assert float((stats.high + stats.low).abs().max()) < 1e-3 * float(stats.maxima.max())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("kind", ("llama", "opt", "qwen2"))
def test_half_precision(kind, dtype):
    "What is stored in 16 bits is representable there, and the function stays within what the walk allows."
    model = inject_outliers(tiny.build(kind, dtype).float(), [5, 33], 32.)
    before = model(TOKENS).logits
    suppressor = OutlierSuppressionV2()
    suppressor._ensure_vllm_compatibility(model)
    views = suppress(model, suppressor, TOKENS, A8, dtype=dtype)
    assert moved(model(TOKENS).logits, before) < 3e-4
    for view in views:
        for name in view.edited:
            for p in model.get_submodule(name).parameters():
                if p.dim() == 1: assert torch.allclose(p, p.to(dtype).float(), rtol=1e-5, atol=1e-8), name
    reasons = [f.get("reason", "") for view in views for f in facts_of(view, suppressor.name).values()]
    if dtype == torch.bfloat16 and kind == "opt":
        assert any("biases in bfloat16 would change the block" in reason for reason in reasons)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_dead_channel_keeps_its_size(maker):
    model = tiny.build("llama", torch.float32)
    for layer in model.model.layers:
        layer.input_layernorm.weight[9] = 0
        layer.self_attn.q_proj.weight[:, 11] = 0
        layer.self_attn.k_proj.weight[:, 11] = 0
        layer.self_attn.v_proj.weight[:, 11] = 0
    before = model(TOKENS).logits
    suppress(model, MAKERS[maker](), TOKENS, A8)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.model.layers[0].input_layernorm.weight[9] == 0
    assert moved(model(TOKENS).logits, before) <= 1e-5


@pytest.mark.parametrize("maker", MAKERS)
def test_a_second_suppression(maker):
    "The function stays once more; SmoothQuant's factors are all 1."
    model, before, _, _, suppressor = suppressed("llama", maker)
    views = suppress(model, suppressor, TOKENS, A8)
    assert moved(model(TOKENS).logits, before) <= 1e-5
    if maker != "fixed": return
    for facts in facts_of(views[0], "smooth_quant").values():
        assert abs(facts["smallest_factor"] - 1) < 5e-3 and abs(facts["largest_factor"] - 1) < 5e-3


@pytest.mark.parametrize("maker", ("fixed", "plus"))
def test_a_consumer_in_float_gets_powers_of_two(maker):
    loop = loop_over(inject_outliers(tiny.build("llama", torch.float32), [5], 24.), TOKENS)
    block, view = view_of(loop, drop=("k_proj",), activations=A8, dtype=torch.float16)
    key = view.module("model.layers.0.self_attn.k_proj").weight
    old, before = key.clone(), loop.run(0, block, loop.activations, 0)
    MAKERS[maker]().apply_to_block(view)
    factors = (key / old).nanmedian(0).values
    assert (factors != 1).any() and (factors.log2() - factors.log2().round()).abs().max() < 5e-3
    assert moved(loop.run(0, block, loop.activations, 0), before) < 1e-5
    loop.blocks.empty()


@pytest.mark.parametrize("maker", MAKERS)
def test_the_walk_holds_them_to_it(maker):
    suppressor = MAKERS[maker]()
    loop = loop_over(inject_outliers(tiny.build("qwen2", torch.float32), [5], 24.), TOKENS)
    loop.suppressors = (suppressor,)
    block, view = view_of(loop, activations=A8)
    groups = loop.find_groups(0, block, {name: view.module(name) for name in view.plans})
    leaders = {names[0]: view.module(names[0]) for names in groups}
    edited = loop.suppress(0, block, view.plans, leaders, groups, view.pairs)
    facts = loop.suppressed[0][suppressor.name]
    assert facts["change"] < 1e-5 and set(facts["modified"]) == edited and facts["pairs"]
    half = tuple(replace(pair, consumers=pair.consumers[:1]) for pair in view.pairs)
    _refused(loop, block, view, leaders, groups, half)
    loop.blocks.empty()


def _refused(loop, block, view, leaders, groups, half):
    with pytest.raises(UsageError, match="changed its function"):
        loop.suppress(0, block, view.plans, leaders, groups, half)


def judged_by(site, target, asked):
    "A trial whose error is least at `target`, and that counts how often it was asked."
    original = site.producer.weight.clone()
    def error(taken=None):
        asked.append(taken)
        return 1e-3 + float(((original / site.producer.weight).log() - target.log()).square().mean())
    return SimpleNamespace(error=error, plain=error(), whole=[], uneven=False)


COARSE_ROW = [(above, strength) for above in (.5, 2.) for strength in STRENGTHS]
BETWEEN = [(1., 1.), (1., .75), (2**.5, 1.), (2**.5, .75)] # reached by making the row finer


@pytest.mark.parametrize("above, strength", COARSE_ROW + BETWEEN)
def test_the_search_finds_threshold_and_strength(above, strength):
    loop = loop_over(inject_outliers(tiny.build("llama", torch.float32), [5, 33], 200.), TOKENS)
    _, view = view_of(loop)
    site = next(site for site in sites_of(view, "it") if "post_attention" in site.pair.producer)
    sizes, asked = site.gather(site.stats.maxima), []
    t = above * float(sizes.median())
    site.trial = judged_by(site, drawn(sizes, t, strength), asked)
    found, factors, errors = find_scale(site, sizes)
    assert found[1] == strength and found[0] == pytest.approx(t, rel=1e-3) and errors[found] == min(errors.values())
    assert len(asked) < 30
    assert torch.equal(factors, drawn(sizes, *found)) and not view.edited
    loop.blocks.empty()


@pytest.mark.parametrize("alpha", (0., .3, .8, 1.))
def test_the_search_finds_alpha(alpha):
    loop = loop_over(inject_outliers(tiny.build("llama", torch.float32), [5, 33], 24.), TOKENS)
    _, view = view_of(loop)
    site, asked = next(site for site in sites_of(view, "it") if "input_layernorm" in site.pair.producer), []
    site.trial = judged_by(site, smoothing_factors(site.gather(site.stats.maxima), site.column_maxima(), alpha), asked)
    SmoothQuantSuppressor().configure({}).edit_site(site)
    assert facts_of(view, "smooth_quant")[site.pair.producer]["alpha"] == alpha
    assert len(asked) <= 7
    loop.blocks.empty()


SMALL = dict(hidden_size=64, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1)
EXHAUSTED = [(*rest, seed) for seed in (0, 1) for rest in (
    ("llama", 8, {}), ("llama", 6, {}), ("llama", 8, SMALL), ("qwen2", 8, {}), ("qwen3", 8, {}), ("opt", 6, {}),
    ("gpt_neox", 8, {}))] + [("qwen3", 6, {}, 2)]


@pytest.mark.parametrize("kind, bits, shape, seed", EXHAUSTED)
def test_the_search_chooses_what_running_the_whole_block_would(kind, bits, shape, seed):
    "The chosen alpha is within 2 % of the best of all eleven and none, each tried on the whole block and all of the text."
    tokens = torch.randint(3, 512, (4, 192), generator=torch.Generator().manual_seed(seed))
    model = inject_outliers(tiny.build(kind, torch.float32, seed=seed, **shape), [5, 33], 24.)
    loop = loop_over(model, tokens)
    _, view = view_of(loop, 1, activations=ActivationScheme(bits=bits))
    for site in sites_of(view, "it"):
        reference = view.outputs(None)
        inputs, columns = site.gather(site.stats.maxima), site.column_maxima()
        errors = {None: view.error(reference, len(reference), site.quantized)}
        for alpha in ALPHAS:
            factors = inputs**alpha / columns**(1 - alpha)
            with site.kept():
                site.scale_by(factors / factors.log().mean().exp())
                errors[alpha] = view.error(reference, len(reference), site.quantized)
        SmoothQuantSuppressor().apply_to_pair(site.pair, view)
        chosen = facts_of(view, "smooth_quant")[site.pair.producer]["alpha"]
        assert errors[chosen] <= 1.02 * min(errors.values()), (site.pair.producer, chosen, errors)
    loop.blocks.empty()


def test_the_search_takes_a_quarter_of_the_products():
    "Beside running the whole block for the reference, for no factors and for eleven alphas of each pair."
    tokens = torch.randint(3, 512, (4, 512), generator=torch.Generator().manual_seed(0))
    loop = loop_over(tiny.build("llama", torch.float32), tokens)
    _, view = view_of(loop, activations=A8)
    with FlopCounterMode(display=False) as once: view.outputs(None)
    with FlopCounterMode(display=False) as search: SmoothQuantSuppressor().apply_to_block(view)
    assert 0 < 4 * search.get_total_flops() < 13 * len(view.pairs) * once.get_total_flops()
    loop.blocks.empty()


@pytest.mark.parametrize("batch_size, batches", ((1, 2), (2, 1), (4, 1)))
def test_a_search_reads_whole_batches_until_there_are_enough(monkeypatch, batch_size, batches):
    monkeypatch.setattr(site_trial, "SEARCH_TOKENS", 90)
    loop = loop_over(tiny.build("llama", torch.float32), TOKENS, batch_size=batch_size)
    _, view = view_of(loop)
    site, *_ = sites_of(view, "it")
    site_trial.record([site])
    assert len(site.trial.batches) == batches and len(view.outputs(None)) == 4 // batch_size
    loop.blocks.empty()


def test_nothing_to_gain_is_no_error(monkeypatch):
    "A block in which no threshold helps is edited all the same, by factors of 1."
    loop = loop_over(tiny.build("llama", torch.float32), TOKENS)
    _, view = view_of(loop)
    monkeypatch.setattr(site_trial.Trial, "error", lambda trial, taken=None: 0.)
    monkeypatch.setattr(site_trial.Trial, "error_of_block", lambda trial: 0.)
    OutlierSuppressionV2().apply_to_block(view)
    assert view.edited and all(f["threshold"] is None for f in facts_of(view, "outlier_suppression_v2").values())
    loop.blocks.empty()


@pytest.mark.parametrize("maker", ("fixed", "plus"))
def test_bad_input_is_named(maker):
    suppressor, loop = MAKERS[maker](), loop_over(tiny.build("llama", torch.float32), TOKENS)
    at = "model.layers.0"
    cases = {(): f"{suppressor.name}: no smoothing pairs are known for block 0",
             (SmoothingPair(f"{at}.norm", (f"{at}.self_attn.q_proj",)),): r"norm -> .*q_proj does not match block 0",
             (SmoothingPair(f"{at}.input_layernorm", (f"{at}.mlp.down_proj",)),): "down_proj reads 256 channels, but"}
    for pairs, message in cases.items():
        _, view = view_of(loop, pairs=pairs)
        with pytest.raises(UsageError, match=message): suppressor.apply_to_block(view)
        assert not view.edited
        loop.blocks.empty()
    _, view = view_of(loop)
    for stats in view.stats.values(): stats.maxima.zero_()
    with pytest.raises(UsageError, match="is zero after 192 calibration tokens"): suppressor.apply_to_block(view)
    loop.blocks.empty()


@pytest.mark.parametrize("alpha", (-.1, 1.01, float("nan"), "0.5", True))
def test_alpha_outside_its_range(alpha):
    with pytest.raises(UsageError, match="quantization.smooth_quant.alpha"):
        SmoothQuantSuppressor().configure({"alpha": alpha})


@pytest.mark.parametrize("kind", ("gemma2", "olmo2", "phi3"))
def test_models_without_pairs(kind):
    loop = loop_over(tiny.build(kind, torch.float32), TOKENS)
    _, view = view_of(loop)
    with pytest.raises(UsageError, match="no smoothing pairs are known"): SmoothQuantSuppressor().apply_to_block(view)
    loop.blocks.empty()


@pytest.mark.parametrize("name,cls", (("smooth_quant", SmoothQuantSuppressor),
                                      ("outlier_suppression_v2", OutlierSuppressionV2)))
def test_recipes_say_what_the_code_reads(name, cls):
    "Every option stands in the recipe's file, with its default."
    path = Path(__file__).parents[1] / "configs" / f"{name}_config.yaml"
    if name not in OutlierSuppressionRegistry.list_suppressors(): OutlierSuppressionRegistry.register(name, cls)
    recipe = resolve(config_path=path)
    assert recipe.outlier_suppression == (name,) and recipe.bits == 8 and recipe.group_size == -1
    assert recipe.activations == ActivationScheme() and recipe.options["symmetric"]
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["quantization"][name]
    assert written == {option.name: option.default for option in cls.options}
    assert recipe.suppressor_options == {f"{name}.{option}": value for option, value in written.items()}
