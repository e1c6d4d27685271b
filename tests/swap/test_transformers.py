"""Models of transformers: swapped, each computes what it computed, in every way it is run."""

import copy

import pytest
import torch
from compared import assert_same, in_float64, run, wrong
from tiny_models import TINY, batch, build

from lam_kernels.swap import register_transformers, swap
from lam_kernels.swap.attend import settings_of

pytest.importorskip("transformers", reason="transformers is not installed: its models not tested")
transformers = pytest.importorskip("transformers")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")

by_name = pytest.mark.parametrize("name", TINY)


def truth_of(model, name):
    """What float64 gets: eager attention of transformers computes its softmax in float32 there, and
    gives NaN for rows without a key."""
    exact = copy.deepcopy(model)
    if name not in ("swinv2", "clap", "detr"):
        exact.set_attn_implementation("sdpa")
    return exact


def valid_of(name, inputs):
    """Rows of a left-padded batch that are tokens: the others see no key, where eager averages."""
    return inputs["attention_mask"].bool() if name == "llama" else None


def compared(name, **options):
    """(swapped model, batch, assertion) with the untouched results at hand."""
    model, inputs = build(name), batch(name)
    options = {"valid": valid_of(name, inputs), **options}
    exact = in_float64(truth_of(model, name), inputs, **options)
    untouched = run(model, inputs, **options)
    return model, inputs, lambda got: assert_same(got, untouched, exact), options


@by_name
def test_same_outputs_and_gradients_in_training(name, spy):
    model, inputs, same, options = compared(name)
    report = swap(model, strict=True)
    assert len(report.changed) == TINY[name].modules
    with spy() as seen:
        same(run(model, inputs, **options))
    assert seen.forwards >= TINY[name].modules  # the decoder of T5 and others: once each
    assert seen.backwards == seen.forwards


@by_name
def test_same_outputs_in_eval_without_gradients(name, spy):
    model, inputs = build(name).eval(), batch(name)
    options = {"valid": valid_of(name, inputs), "grad": False}
    exact = in_float64(truth_of(model, name), inputs, **options)
    untouched = run(model, inputs, **options)
    swap(model)
    with spy() as seen:
        assert_same(run(model, inputs, **options), untouched, exact)
    assert seen.forwards >= TINY[name].modules


@by_name
def test_same_under_autocast(name, spy):
    model, inputs, same, options = compared(name, autocast=True)
    swap(model)
    with spy() as seen:
        same(run(model, inputs, **options))
    assert seen.forwards >= TINY[name].modules


@by_name
def test_same_with_gradient_checkpointing(name, spy):
    model, inputs, same, options = compared(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{name} has no gradient checkpointing in transformers")
    swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with spy() as seen:
        found = run(model, inputs, **options)
    assert seen.forwards > seen.backwards > 0  # recomputed
    same(found)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_same_with_reentrant_checkpointing(name):
    model, inputs, same, options = compared(name)
    swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()  # of the layers, which transformers asks for
    same(run(model, inputs, backward=True, **options))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama", "swinv2") else pytest.mark.full)
        for name in TINY
    ],
)
def test_compiles_to_the_same(name):
    torch._dynamo.reset()
    model, inputs, same, options = compared(name)
    swap(model)
    compiled = torch.compile(model, backend="aot_eager")
    same({n.removeprefix("_orig_mod."): t for n, t in run(compiled, inputs, **options).items()})
    torch._dynamo.reset()


@by_name
@pytest.mark.parametrize("first", ["swap", "peft"])
def test_lora_on_a_swapped_model(name, first):
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA not tested")
    inputs = batch(name)
    options = {"valid": valid_of(name, inputs)}

    def with_lora(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=list(TINY[name].lora), init_lora_weights=False)
        return peft.get_peft_model(model, config)

    expected = with_lora(build(name))
    untouched = run(expected, inputs, **options)
    truth = with_lora(truth_of(build(name), name))
    exact = in_float64(truth, inputs, **options)
    if first == "swap":
        swap(inner := build(name))
        model = with_lora(inner)
    else:
        model = with_lora(build(name))
        assert len(swap(model).changed) == TINY[name].modules
    got = run(model, inputs, **options)
    assert_same(got, untouched, exact)
    assert any("lora" in n for n in got)


def test_a_wrong_mask_would_be_seen():
    """The comparison of these tests can fail: one padded key shown, one head's scale off by 1 %."""
    model, inputs = build("bert"), batch("bert")
    exact, untouched = in_float64(truth_of(model, "bert"), inputs), run(model, inputs)
    swap(model)
    shown = inputs["attention_mask"].clone()
    shown[1, 6] = 1
    assert wrong(run(model, {**inputs, "attention_mask": shown}), untouched, exact)
    for layer in model.encoder.layer:
        layer.attention.self.scaling *= 1.01
    assert wrong(run(model, inputs), untouched, exact)


# ---- causality, padding and caches


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["none", "ones", "left", "right"])
def test_llama_padding_and_causality(attention, mask):
    model = build("llama", attention).eval()
    inputs = batch("llama")
    given = torch.ones_like(inputs["attention_mask"])
    if mask in ("left", "right"):
        given[1, :3] = 0
        given = given if mask == "left" else given.flip(1)
    valid = given.bool()
    inputs["attention_mask"] = None if mask == "none" else given
    expected = model(**inputs).logits[valid]
    swap(model)
    torch.testing.assert_close(model(**inputs).logits[valid], expected)
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][0, 5:] = 7  # the future
    later = model(**changed).logits
    torch.testing.assert_close(later[0, :5], model(**inputs).logits[0, :5])


@pytest.mark.parametrize("cache", [None, "static"])
def test_llama_generates_the_same(cache, spy):
    model, inputs = build("llama", "sdpa").eval(), batch("llama")
    inputs.pop("use_cache")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True
    expected = model.generate(**inputs, **options)
    swap(model)
    with spy() as seen:
        got = model.generate(**inputs, **options)
    assert seen.forwards == 2 * 6
    assert torch.equal(got, expected)


def test_clip_text_is_causal_by_keyword():
    """module.is_causal is False there; a call without padding says so by keyword only."""
    model, inputs = build("clip", "sdpa").eval(), batch("clip")
    inputs["attention_mask"] = None
    swap(model)
    before = model.text_model(input_ids=inputs["input_ids"]).last_hidden_state
    changed = inputs["input_ids"].clone()
    changed[:, 6:] = 7
    after = model.text_model(input_ids=changed).last_hidden_state
    torch.testing.assert_close(after[:, :6], before[:, :6])


def bidirectional_text():
    """A text encoder for eager attention only, whose modules have no is_causal."""
    from transformers.models.clap.modeling_clap import ClapTextModel

    torch.manual_seed(0)
    config = transformers.ClapTextConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    return ClapTextModel(config).eval()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 9, dtype=torch.long)], ids=["none", "ones"])
def test_no_mask_of_eager_attention_hides_nothing(mask, spy):
    model = bidirectional_text()
    inputs = {"input_ids": batch("bert")["input_ids"], "attention_mask": mask}
    untouched, exact = run(model, inputs), in_float64(model, inputs)
    assert len(swap(model, strict=True).changed) == 2
    with spy() as seen:
        assert_same(run(model, inputs), untouched, exact)
    assert seen.forwards == 2


def test_a_registered_name_does_not_guess_causality():
    register_transformers()
    model = bidirectional_text()
    model.set_attn_implementation("lam_kernels")
    with pytest.raises(ValueError, match="does not say whether it is causal"):
        model(input_ids=batch("bert")["input_ids"])


def test_position_bias_of_t5_gets_its_gradient():
    model, inputs = build("t5"), batch("t5")
    swap(model)
    found = run(model, inputs)
    for stack in ("encoder", "decoder"):
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert found[name].abs().sum() > 0


def test_timesformer_is_named_with_its_reason():
    model = transformers.TimesformerModel(
        transformers.TimesformerConfig(
            image_size=16,
            patch_size=8,
            num_frames=2,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(model)
    assert list(report.skipped) == [
        "encoder.layer.0.attention.attention",
        "encoder.layer.0.temporal_attention.attention",
    ]
    assert all("TimesformerSelfAttention is not known" in why for why in report.skipped.values())


# ---- what stays


class MasksByName(llama.LlamaAttention):
    """As sparse attention does it: what the two functions cannot do goes into their mask."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **keywords):
        if self.config._attn_implementation in ("eager", "sdpa"):
            attention_mask = attention_mask[..., :1]
        return llama.ALL_ATTENTION_FUNCTIONS, attention_mask


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "sinks", torch.zeros(4)), "sink"),
        (lambda m: setattr(m, "sink_proj", torch.nn.Linear(4, 4)), "sink"),
        (lambda m: setattr(m, "indexer", torch.nn.Linear(4, 4)), "picks its keys by an index"),
        (lambda m: setattr(m, "__class__", MasksByName), "makes other masks"),
        (lambda m: setattr(m, "attn_logit_softcapping", 30.0), "caps its scores"),
        (lambda m: setattr(m, "head_dim", 512), "head dim is 512"),
        (lambda m: m.half().to(torch.int8), "torch.int8"),
    ],
)
def test_modules_that_stay(change, reason):
    model = build("llama")
    if reason == "torch.int8":
        for parameter in model.model.layers[0].self_attn.parameters():
            parameter.requires_grad = False
            parameter.data = parameter.data.to(torch.int8)
    else:
        change(model.model.layers[0].self_attn)
    report = swap(model)
    assert reason in report.skipped["model.layers.0.self_attn"]
    assert list(report.changed) == ["model.layers.1.self_attn"]


def test_another_attention_implementation_stays():
    model = build("llama", "flex_attention")
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(model)
    assert 'call model.set_attn_implementation("sdpa")' in str(report)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "cache", "sinks", "block_indices"])
def test_another_formula_is_refused_when_it_comes(keyword):
    register_transformers()
    function = transformers.AttentionInterface()["lam_kernels"]
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=keyword):
        function(torch.nn.Identity(), q, q, q, None, **{keyword: 1.0})


# ---- only this instance


def test_another_model_of_the_same_config_is_untouched(spy):
    config = build("bert").config
    first, second = transformers.BertModel(config), transformers.BertModel(config)
    assert first.config is second.config
    report = swap(first)
    with spy() as seen:
        second(**batch("bert"))
    assert seen.forwards == 0
    assert first.config._attn_implementation == config._attn_implementation
    module = first.encoder.layer[0].attention.self
    assert isinstance(module.config, transformers.BertConfig)
    first.config.hidden_act = "changed later"
    assert module.config.hidden_act == "changed later"
    report.undo()
    assert module.config is config


def test_copies_and_pickles_of_a_swapped_model_are_swapped(spy, tmp_path):
    for name in ("llama", "swinv2"):
        model, inputs = build(name).eval(), batch(name)
        swap(model)
        torch.save(model, tmp_path / "model.pt")
        expected = run(model, inputs, grad=False)
        for other in (
            copy.deepcopy(model),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ):
            with spy() as seen:
                found = run(other, inputs, grad=False)
            assert seen.forwards == TINY[name].modules
            for key, value in expected.items():
                assert torch.equal(found[key], value)


@pytest.mark.parametrize("place", ["config", "keyword"])
def test_weights_that_are_wanted_are_warned_about(place):
    model, inputs = build("bert"), batch("bert")
    swap(model)
    if place == "config":
        model.config.output_attentions = True
    else:
        inputs["output_attentions"] = True
    with pytest.warns(UserWarning, match="output_attentions=True: the kernels store no"):
        assert not model(**inputs).attentions


# ---- by name


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5"])
def test_registered_name(name, spy):
    register_transformers()
    register_transformers()
    model, inputs = build(name), batch(name)
    valid = valid_of(name, inputs)
    exact = in_float64(truth_of(model, name), inputs, valid=valid)
    untouched = run(model, inputs, valid=valid)
    model.set_attn_implementation("lam_kernels")
    assert settings_of(model).owner == -1
    with spy() as seen:
        assert_same(run(model, inputs, valid=valid), untouched, exact)
    assert seen.forwards >= TINY[name].modules


def test_registered_name_in_a_config():
    register_transformers()
    config = build("bert").config
    model = transformers.BertModel._from_config(config, attn_implementation="lam_kernels")
    assert model.config._attn_implementation == "lam_kernels"
    with swap(model, backend="reference") as report:
        assert len(report.changed) == 2
