"""nn.MultiheadAttention and what is built of it, against itself before the swap."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lam_kernels import Toeplitz
from lam_kernels.swap import LearnedMask, swap
from lam_kernels.swap.torch_modules import SwappedMultiheadAttention

E, H, B, L, S = 12, 3, 2, 5, 7


@pytest.fixture(autouse=True)
def float64():
    """Where the default tolerances of torch.testing mean something."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, options.pop("heads", H), **options)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def masks(kind: str, heads: int = H):
    """attn_mask and key_padding_mask; no row is without a key."""
    torch.manual_seed(2)
    hidden = torch.rand(L, S) < 0.4
    hidden[:, 0] = False
    each = torch.rand(B * heads, L, S) < 0.4
    each[:, :, 0] = False
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    negative = torch.zeros(B, S).masked_fill(padding, -torch.inf)
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "bool each head": {"attn_mask": each},
        "float": {"attn_mask": torch.randn(L, S)},
        "float each head": {"attn_mask": torch.randn(B * heads, L, S)},
        "-inf": {"attn_mask": torch.zeros(L, S).masked_fill(hidden, -torch.inf)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": negative},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "both float": {"attn_mask": torch.randn(L, S), "key_padding_mask": negative},
        "mixed": {"attn_mask": hidden, "key_padding_mask": negative},
    }[kind]


KINDS = [
    "none", "bool", "bool each head", "float", "float each head", "-inf", "padding",
    "float padding", "both", "both float", "mixed",
]  # fmt: skip


def results(module, query, key, value, **options):
    """Output, weights and all gradients, of the inputs and a float mask too."""
    leaves = [query, key, value, *module.parameters()]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask = mask.clone().requires_grad_()
        leaves.append(mask)
    out, weights = module(query, key, value, **options)
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum()
    if weights is not None and weights.requires_grad:
        loss = loss + weights.square().sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out, weights, *grads]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def sequences(lengths=(L, S, S), widths=(E, E, E), batch_first=True):
    torch.manual_seed(1)
    made = [torch.randn(B, n, w, requires_grad=True) for n, w in zip(lengths, widths, strict=True)]
    return made if batch_first else [x.detach().transpose(0, 1).requires_grad_() for x in made]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:need_weights|Support for mismatched")
def test_masks(kind, need_weights, spy):
    module, x = attention(batch_first=True), sequences()
    options = {**masks(kind), "need_weights": need_weights, "average_attn_weights": False}
    theirs = results(module, *x, **options)
    swap(module, strict=True)
    with spy() as seen:
        same(results(module, *x, **options), theirs)
    assert (seen.forwards, seen.backwards) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": False},
        {"bias": False, "batch_first": True},
        {"kdim": 5, "vdim": 8, "batch_first": True},
        {"kdim": 5, "vdim": 8, "bias": False},
        {"heads": 4, "batch_first": True},
    ],
    ids=str,
)
def test_shapes_and_projections(options):
    heads = options.get("heads", H)
    module = attention(**options)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    x = sequences(widths=widths, batch_first=options.get("batch_first", False))
    given = {**masks("both", heads), "need_weights": False}
    theirs = results(module, *x, **given)
    with swap(module, strict=True):
        same(results(module, *x, **given), theirs)


def test_self_attention_is_one_product_and_the_same():
    module = attention(batch_first=True)
    x = sequences((S, S, S))[0]
    y = x.detach().clone().requires_grad_()
    for args in ((x, x, x), (y, x, x), (y, x, y)):
        leaves = [x, y, *module.parameters()]
        found = []
        for swapped in (False, True):
            report = swap(module) if swapped else None
            out = module(*args, need_weights=False)[0]
            found.append([out, *torch.autograd.grad(out.sum(), leaves, allow_unused=True)])
            if report:
                report.undo()
        same(found[1], found[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.filterwarnings("ignore:need_weights")
def test_one_sequence_without_a_batch(need_weights):
    module = attention()
    x = [t[0].detach().requires_grad_() for t in sequences()]
    padding = masks("padding")["key_padding_mask"][1]
    options = {"key_padding_mask": padding, "need_weights": need_weights}
    theirs = results(module, *x, **options)
    swap(module)
    same(results(module, *x, **options), theirs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_causal_hint(padded):
    module, x = attention(batch_first=True), sequences((S, S, S))
    options = {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(S),
        "is_causal": True,
        "need_weights": False,
        **(masks("padding") if padded else {}),
    }
    theirs = results(module, *x, **options)[:5]
    swap(module)
    same(results(module, *x, **options)[:5], theirs)
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        module(*x, is_causal=True)


def test_weights_cost_extra_and_say_so():
    module, x = attention(batch_first=True), sequences()
    swap(module)
    with pytest.warns(UserWarning, match="Pass need_weights=False"):
        module(*x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module(*x, need_weights=False)[1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.zeros(3, 3)}, r"attn_mask must be \[5, 7\] or \[6, 5, 7\]"),
        ({"key_padding_mask": torch.zeros(2, 3)}, r"key_padding_mask must be \[2, 7\]"),
    ],
)
def test_wrong_masks_are_named(options, message):
    module = attention(batch_first=True)
    swap(module)
    with pytest.raises(ValueError, match=message):
        module(*sequences(), need_weights=False, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    swap(module := attention(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(ValueError, match="nested tensors are not served"):
        module(x, x, x, need_weights=False)


def test_dropout_acts_in_training_only():
    module = attention(dropout=0.5, batch_first=True)
    x = sequences()
    swap(module)
    assert not torch.equal(*[module(*x, need_weights=False)[0] for _ in range(2)])
    module.eval()
    assert torch.equal(*[module(*x, need_weights=False)[0] for _ in range(2)])


# ---- transformers of torch


def stack(kind, **options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dim_feedforward": 16, **options}
    if kind == "encoder layer":
        return nn.TransformerEncoderLayer(16, 4, **options)
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, **options), 2)
    if kind == "decoder layer":
        return nn.TransformerDecoderLayer(16, 4, **options)
    if kind == "decoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, **options), 2)
    return nn.Transformer(16, 4, 1, 1, **options)


STACKS = {"encoder layer": 1, "encoder": 2, "decoder layer": 2, "decoder": 4, "transformer": 3}


def arguments(kind):
    torch.manual_seed(1)
    x, memory = torch.randn(B, S, 16), torch.randn(B, L, 16)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    if "encoder" in kind:
        return (x,), {"src_key_padding_mask": padding}, ~padding
    if kind == "transformer":
        causal = nn.Transformer.generate_square_subsequent_mask(S) < 0
        options = {"tgt_mask": causal, "tgt_key_padding_mask": padding, "tgt_is_causal": True}
        return (memory, x), options, ~padding
    return (x, memory), {"tgt_key_padding_mask": padding}, ~padding


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor|Support for mismatched")
def test_stacks_in_training(kind, norm_first, spy):
    model = stack(kind, norm_first=norm_first)
    args, options, _ = arguments(kind)

    def all_of(model):
        out = model(*args, **options)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    theirs = all_of(model)
    assert len(swap(model, strict=True).changed) == STACKS[kind]
    with spy() as seen:
        same(all_of(model), theirs)
    assert (seen.forwards, seen.backwards) == (STACKS[kind], STACKS[kind])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_fast_path_skips_a_swapped_module(kind, around, autocast, spy):
    """In eval without gradients these layers run a kernel of their own on self_attn's weights:
    whatever was swapped in would vanish without a word."""
    model = stack(kind).eval().float()
    args, options, valid = arguments(kind)
    args = [x.float() for x in args]
    with around():
        theirs = model(*args, **options)
    report = swap(model)
    # (torch's own fast path fails under autocast of the CPU: it asks for that of CUDA)
    with around(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), spy() as seen:
        ours = model(*args, **options)
    assert seen.forwards == STACKS[kind]
    tolerance = {"rtol": 2**-6, "atol": 2**-5} if autocast else {}  # bf16 rounds at 2**-8
    torch.testing.assert_close(ours[valid].float(), theirs[valid], **tolerance)
    report.undo()
    with around():
        assert torch.equal(model(*args, **options), theirs)
        swap(model, patterns=Toeplitz(0))
        assert not torch.allclose(model(*args, **options)[valid], theirs[valid])


def test_an_encoder_built_of_a_swapped_layer(spy):
    """TransformerEncoder deep-copies its layer."""
    layer = stack("encoder layer").eval()
    swap(layer)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad(), spy() as seen:
        model(torch.randn(B, S, 16))
    assert seen.forwards == 2


@pytest.mark.parametrize("swapped", [0, 1])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_one_layer_of_an_encoder_that_packs(swapped, spy):
    """The encoder around it was not given to swap(), and packs a padded batch in eval."""
    model, ((x,), options, valid) = stack("encoder").eval(), arguments("encoder")
    with torch.no_grad():
        theirs = model(x, **options)[valid]
        with swap(model.layers[swapped]), spy() as seen:
            same(model(x, **options)[valid], theirs)
        assert seen.forwards == 1
        swap(model.layers[swapped], learned_mask=LearnedMask(S), patterns=Toeplitz(0))
        assert not torch.allclose(model(x, **options)[valid], theirs)


@pytest.mark.parametrize("kind", ["encoder", "decoder layer"])
def test_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    model = stack(kind)
    args, options, _ = arguments(kind)
    expected = model(*args, **options)
    swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(*args, **options)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    for module in model.modules():
        if isinstance(module, SwappedMultiheadAttention):
            assert module.in_proj_weight.grad.abs().sum() > 0
    torch._dynamo.reset()


def test_a_compiled_model_notices_the_swap(spy):
    torch._dynamo.reset()
    model = stack("encoder layer")
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(B, S, 16)
    expected = compiled(x)
    report = swap(compiled)
    assert list(report.changed) == ["_orig_mod.self_attn"]
    torch.testing.assert_close(compiled(x), expected)
    with swap(model, patterns=Toeplitz(0)):
        assert not torch.allclose(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, spy):
    from torch.utils.checkpoint import checkpoint

    model = stack("encoder layer")
    x = torch.randn(B, S, 16, requires_grad=True)

    def gradients(model, around):
        model.zero_grad()
        around(model, x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    theirs = gradients(model, lambda m, x: m(x))
    swap(model)
    with spy() as seen:
        found = gradients(model, lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert (seen.forwards, seen.backwards) == (2, 1)
    same(found, theirs)


def test_lora_on_a_swapped_stack():
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA not tested")
    config = peft.LoraConfig(r=2, target_modules=["self_attn"], init_lora_weights=False)
    found = []
    for order in ("none", "swap first", "peft first"):
        model = stack("encoder layer")
        if order == "swap first":
            swap(model)
        torch.manual_seed(4)
        model = peft.get_peft_model(model, config)
        if order == "peft first":
            assert len(swap(model).changed) == 1
        out = model(arguments("encoder")[0][0])
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found.append([out, *torch.autograd.grad(out.square().sum(), list(trained.values()))])
    same(found[1], found[0])
    same(found[2], found[0])


def test_vmap_and_func_over_a_swapped_module():
    module = attention(batch_first=True)
    x = torch.randn(3, B, S, E)
    expected = torch.stack([module(one, one, one, need_weights=False)[0] for one in x])
    swap(module)

    def call(parameters, one):
        return torch.func.functional_call(
            module, parameters, (one, one, one), {"need_weights": False}
        )[0]

    parameters = copy.deepcopy(dict(module.named_parameters()))
    torch.testing.assert_close(torch.vmap(call, (None, 0))(parameters, x), expected)
