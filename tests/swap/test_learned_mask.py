"""A learned mask in a model that exists: identity start, gradients, refusals, peft, recomputing."""

import threading

import pytest
import torch
from compared import assert_same, in_float64, run, wake
from tiny_models import TINY, batch, build
from torch import nn

from lam_kernels import Toeplitz
from lam_kernels.swap import LearnedMask, swap

WITH_TOKENS = [name for name, tiny in TINY.items() if tiny.tokens]


def right_padded(name):
    inputs = batch(name)
    if name == "llama":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


def lam_gradients(model, inputs, **options):
    found = run(model, inputs, **options)
    return {n: g for n, g in found.items() if ".lam." in n}


@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
@pytest.mark.parametrize("name", WITH_TOKENS)
def test_unchanged_at_the_start_and_trained_after(name, fusion):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = build(name, "sdpa"), right_padded(name)
    untouched, exact = run(model, inputs), in_float64(model, inputs)
    activation = "softplus" if fusion == "gate" else None
    mask = LearnedMask(TINY[name].tokens, fusion=fusion, activation=activation)
    report = swap(model, learned_mask=mask)
    cross = [n for n, what in report.changed.items() if "cross-attention" in what]
    assert len(cross) == {"t5": 2}.get(name, 0)
    assert len(report.learned_parameters()) == 2 * (len(report.changed) - len(cross))
    found = run(model, inputs)
    assert_same({n: t for n, t in found.items() if ".lam." not in n}, untouched, exact)
    for key, gradient in found.items():
        if key.endswith(".lam.layers.0.bias"):
            assert gradient.abs().sum() > 0, key
    optimizer = torch.optim.SGD(report.learned_parameters(), lr=0.1)
    for parameter in report.learned_parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not torch.allclose(run(model, inputs)["output 0"], untouched["output 0"])


@pytest.mark.parametrize("heads", ["shared", "each"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["llama", "bert", "swinv2"])
def test_the_op_and_the_reference_agree(name, scope, heads):
    """A woken mask through every adapter, against plain PyTorch in float64."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "swinv2" and scope == "global":
        pytest.skip("the widths of its stages differ: see test_global_needs_one_width")
    model, inputs = build(name, "sdpa"), right_padded(name)
    mask = LearnedMask(TINY[name].tokens, scope=scope, heads=heads, depth=2)
    report = swap(model, learned_mask=mask)
    wake(model)
    assert report.check(inputs, against="reference").ok


def test_a_global_mask_is_one_generator():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True), 3)
    report = swap(model, learned_mask=LearnedMask(8, scope="global"))
    assert [n for n in model.state_dict() if ".lam." in n] == [
        "layers.0.self_attn.lam.layers.0.weight",
        "layers.0.self_attn.lam.layers.0.bias",
    ]
    assert report.changed["layers.2.self_attn"] == ("masked_attention; learned mask (global, mul)")
    wake(model)
    x = torch.randn(2, 6, 16)
    lam = model.layers[0].self_attn.lam
    model(x).square().sum().backward()
    # the same model with M given from outside to every layer: M as a leaf gets the same gradient
    mask = lam(x).detach().requires_grad_()
    source = [layer.self_attn.lam_swap.source for layer in model.layers]
    for one in source:
        one.take = lambda module, tokens: mask
    model(x).square().sum().backward()
    lam.zero_grad()
    lam(x).backward(mask.grad)
    expected = lam.layers[0].weight.grad.clone()
    for one in source:
        del one.take
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(lam.layers[0].weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_global_needs_one_width():
    pytest.importorskip("transformers", reason="transformers is not installed")
    report = swap(build("swinv2"), learned_mask=LearnedMask(16, scope="global"))
    assert len(report.changed) == 2
    assert all("it has width 32 and 4 heads" in why for why in report.skipped.values())


def test_global_is_of_one_stack():
    """A mask of the encoder's tokens has nothing to say to the decoder's."""
    model = nn.Transformer(16, 4, 2, 2, 24, 0.0, batch_first=True)
    report = swap(model, learned_mask=LearnedMask(8, scope="global"))
    stayed = {f"decoder.layers.{n}.self_attn" for n in (0, 1)}
    assert set(report.skipped) == stayed
    assert all("the mask belongs to encoder.layers.*" in why for why in report.skipped.values())


def test_masks_by_name():
    """None leaves a module out; each global LearnedMask is a generator of its own."""
    model = nn.Transformer(16, 4, 2, 2, 24, 0.0, batch_first=True)
    one, other = LearnedMask(8, scope="global"), LearnedMask(8, scope="global")
    by_name = {"encoder.layers.0.*": None, "encoder.*": one, "decoder.*": other}
    with swap(model, learned_mask=by_name, strict=True) as report:
        assert report.changed["encoder.layers.0.self_attn"] == "masked_attention"
        assert {n.partition(".lam.")[0] for n in model.state_dict() if ".lam." in n} == {
            "encoder.layers.1.self_attn",
            "decoder.layers.0.self_attn",
        }
        assert "no learned mask" in report.changed["decoder.layers.0.multihead_attn"]
        wake(model)
        model(torch.randn(2, 6, 16), torch.randn(2, 5, 16)).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in report.learned_parameters())


def test_cross_attention_of_another_name_is_left_out_by_name():
    model = nn.ModuleDict(
        {"read": nn.MultiheadAttention(16, 4), "own": nn.MultiheadAttention(16, 4)}
    )
    query, memory = torch.randn(3, 2, 16), torch.randn(5, 2, 16)
    with swap(model, learned_mask=LearnedMask(8)), pytest.raises(ValueError, match=(
        r"read: a learned mask .* 3 queries and 5 keys.*learned_mask=\{'read': None, '\*': "
    )):  # fmt: skip
        model["read"](query, memory, memory, need_weights=False)
    report = swap(model, learned_mask={"read": None, "*": LearnedMask(8)}, strict=True)
    model["read"](query, memory, memory, need_weights=False)
    assert "learned mask" in report.changed["own"]


def test_tokens_that_are_not_hidden_states():
    """A learned mask reads the hidden states: a module that has none of that name stays."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import SamMaskDecoderConfig
    from transformers.models.sam.modeling_sam import SamTwoWayAttentionBlock

    config = SamMaskDecoderConfig(
        hidden_size=32, num_attention_heads=4, mlp_dim=16, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(SamTwoWayAttentionBlock(config), learned_mask=LearnedMask(16))
    assert all("the width of its tokens" in why for why in report.skipped.values())


def test_global_and_checkpointing_are_refused_together():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = build("bert"), batch("bert")
    swap(model, learned_mask=LearnedMask(9, scope="global"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="scope='layer', or switch gradient checkpointing off"):
        run(model, inputs)


@pytest.mark.parametrize("name", ["llama", "bert", "swinv2"])
def test_gradients_are_the_same_when_recomputed(name):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = build(name), right_padded(name)
    swap(model, learned_mask=LearnedMask(TINY[name].tokens))
    expected = run(wake(model), inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.full)])
def test_compiles_to_one_graph(name):
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch._dynamo.reset()
    model, inputs = build(name, "sdpa"), right_padded(name)
    swap(model, learned_mask=LearnedMask(9), patterns=Toeplitz(4))
    wake(model)
    expected = run(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {n.removeprefix("_orig_mod."): t for n, t in run(compiled, inputs).items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
def test_float_masks_beside_a_learned_one(fusion):
    """eager masks of transformers and nn.TransformerEncoder are added; a gate multiplies."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    swap(
        layer,
        learned_mask=LearnedMask(
            8, fusion=fusion, activation="softplus" if fusion == "gate" else None
        ),
    )
    wake(layer)
    x, padding = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    out = layer(x, src_key_padding_mask=padding)
    short = layer(x[1:, :4])
    torch.testing.assert_close(out[1, :4], short[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_two_threads_keep_their_tokens_apart(scope):
    """One stops in its last layer, between its tokens and its attention, until the other ran."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = build("bert", "sdpa").eval()
    swap(model, learned_mask=LearnedMask(9, scope=scope))
    wake(model)
    first, second = batch("bert"), right_padded("bert")
    second["input_ids"] = second["input_ids"].flip(1)
    expected = model(**first).last_hidden_state
    projection = model.encoder.layer[-1].attention.self.query

    def run_the_other(module, args):
        handle.remove()
        other = threading.Thread(target=lambda: model(**second))
        other.start()
        other.join()

    handle = projection.register_forward_pre_hook(run_the_other)
    torch.testing.assert_close(model(**first).last_hidden_state, expected)


# ---- positions


def test_left_padding_is_refused_with_the_reason():
    pytest.importorskip("transformers", reason="transformers is not installed")
    for attention in ("eager", "sdpa"):
        model, inputs = build("llama", attention), batch("llama")
        swap(model, learned_mask=LearnedMask(9))
        with pytest.raises(ValueError, match="left padding moves every token to another column"):
            model(**inputs)
        model(**right_padded("llama"))


@pytest.mark.full
def test_left_padding_is_refused_in_a_graph():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = build("llama", "sdpa")
    swap(model, learned_mask=LearnedMask(9))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**right_padded("llama"))
    with pytest.raises(RuntimeError, match="left padding"):
        compiled(**batch("llama"))
    torch._dynamo.reset()


def test_left_padding_of_a_torch_layer_is_refused():
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    swap(layer, learned_mask=LearnedMask(8))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, :2] = True
    x = torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match="Pad on the right"):
        layer(x, src_key_padding_mask=padding)
    with pytest.raises(ValueError, match="Pad on the right"):
        layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)


def test_a_cache_is_refused_with_the_reason():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = build("llama", "sdpa").eval(), right_padded("llama")
    inputs = {"input_ids": inputs["input_ids"]}
    swap(model, learned_mask=LearnedMask(16))
    with pytest.raises(ValueError, match="key/value cache"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    assert out.shape == (2, 12)


def test_too_long_a_sequence_is_refused():
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    swap(layer, learned_mask=LearnedMask(5))
    with pytest.raises(ValueError, match="max_len=5"):
        layer(torch.randn(2, 6, 16))


def test_cross_attention_gets_none_and_says_so():
    model = nn.TransformerDecoderLayer(16, 4, 24, 0.0, batch_first=True)
    report = swap(model, learned_mask=LearnedMask(8), patterns=Toeplitz(2))
    assert report.changed == {
        "self_attn": "masked_attention; learned mask (layer, mul); pattern",
        "multihead_attn": (
            "masked_attention; no learned mask: cross-attention; no pattern: cross-attention"
        ),
    }
    assert torch.isfinite(model(torch.randn(2, 6, 16), torch.randn(2, 4, 16))).all()
    report.undo()
    by_name = swap(model, patterns={"multihead_attn": Toeplitz(2)})
    assert by_name.changed["multihead_attn"] == "masked_attention; pattern"


@pytest.mark.filterwarnings("ignore:need_weights")
def test_weights_of_a_masked_module():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    swap(module, learned_mask=LearnedMask(8))
    wake(module)
    x = torch.randn(2, 6, 16)
    out, weights = module(x, x, x, average_attn_weights=False)
    value = nn.functional.linear(x, *[p.chunk(3)[2] for p in (module.in_proj_weight,)])
    value = value + module.in_proj_bias.chunk(3)[2]
    value = value.unflatten(-1, (4, 4)).transpose(1, 2)
    expected = module.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# ---- options and peft


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len must be an integer of at least 1"),
        ({"max_len": 8, "scope": "all"}, "scope must be one of"),
        ({"max_len": 8, "heads": 4}, "heads must be one of"),
        ({"max_len": 8, "fusion": "gate"}, "activation must be one of"),
        ({"max_len": 8, "depth": 65}, "depth must be an integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedMask(**options)


def test_modules_that_cannot_have_one_stay():
    class Named(nn.MultiheadAttention):
        pass

    module = nn.MultiheadAttention(16, 4)
    module.lam = None
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(module, learned_mask=LearnedMask(8))
    assert "attribute `lam` of its own" in report.skipped[""]
    ddp = type("DistributedDataParallel", (nn.Module,), {})()
    with pytest.raises(ValueError, match="swap a learned mask in first, then wrap"):
        swap(ddp, learned_mask=LearnedMask(8))


@pytest.mark.parametrize("first", ["swap", "peft"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_peft_keeps_the_mask_trainable(name, first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = build(name, "sdpa"), right_padded(name)
    if first == "swap":
        report = swap(model, learned_mask=LearnedMask(9))
        config = peft.LoraConfig(r=2, target_modules=list(TINY[name].lora), modules_to_save=["lam"])
        model = peft.get_peft_model(model, config)
    else:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=list(TINY[name].lora))
        )
        with pytest.warns(UserWarning, match=r"will not write the learned masks: swap first"):
            report = swap(model, learned_mask=LearnedMask(9))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora" in n or "lam" in n for n in trainable)
    found = run(model, inputs)
    masks = [n for n in found if ".lam." in n]
    assert len(masks) == 2 * len(report.changed)
    assert any(found[n].abs().sum() > 0 for n in masks if n.endswith("bias"))
    if first == "swap":  # the mask goes into the adapter's checkpoint
        assert any("lam" in n for n in peft.get_peft_model_state_dict(model))
    report.undo()
    assert not [n for n, _ in model.named_parameters() if ".lam." in n]
