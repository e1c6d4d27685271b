"""LAMCrossAttention: formula, slicing, padding, start, refusals, stable state_dict."""

import pytest
import torch
import torch.nn.functional as F

from lam_kernels.nn import LAMCrossAttention, LearnableAttentionMask


def attention(backend=None, fusion="mul", depth=3, max_len=9, lam=True, init="paper", **options):
    torch.manual_seed(0)
    generator = LearnableAttentionMask(max_len, max_len, depth, 6, fusion=fusion, init=init)
    lam = generator if lam else None
    return LAMCrossAttention(16, 2, lam=lam, memory_dim=12, backend=backend, **options)


def by_hand(module, x, memory, key_mask):
    """The formulas of the docstring, spelt out."""
    Lk, width = memory.shape[1], module.head_dim
    query = x @ module.query.weight.T + module.query.bias
    key, value = (memory @ module.key_value.weight.T + module.key_value.bias).chunk(2, dim=-1)
    parts = [slice(h * width, (h + 1) * width) for h in range(module.num_heads)]
    scores = [query[..., p] @ key[..., p].transpose(1, 2) / width**0.5 for p in parts]
    inputs = scores if module.mask_heads == "each" else [sum(scores) / len(scores)] * len(scores)
    heads = []
    for score, rows, part in zip(scores, inputs, parts, strict=True):
        mask = rows.masked_fill(~key_mask[:, None, :], 0.0)
        mask = F.pad(mask, (0, module.lam.max_len - Lk))
        for n, layer in enumerate(module.lam.layers):
            mask = layer(F.relu(mask) if n else mask)
        mask = mask[..., :Lk]
        fused = score * mask if module.lam.fusion == "mul" else score + mask
        fused = fused.masked_fill(~key_mask[:, None, :], -torch.inf)
        heads.append(torch.softmax(fused, dim=-1) @ value[..., part])
    return torch.cat(heads, dim=-1) @ module.out.weight.T + module.out.bias


@pytest.mark.parametrize("mask_heads", ["each", "mean"])
@pytest.mark.parametrize(("fusion", "depth", "Lk"), [("mul", 3, 9), ("add", 1, 7), ("mul", 1, 4)])
def test_formula(backend, fusion, depth, Lk, mask_heads):
    module = attention(backend, fusion, depth, mask_heads=mask_heads)
    x, memory = torch.randn(3, 5, 16), torch.randn(3, Lk, 12)
    key_mask = torch.arange(Lk)[None] < torch.tensor([[Lk], [3], [1]])
    expected = by_hand(module, x, memory, key_mask)
    out = module(x, memory, key_mask=key_mask)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    parameters = list(module.parameters())
    for one, other in zip(
        torch.autograd.grad(out, parameters, seed),
        torch.autograd.grad(expected, parameters, seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fusion", ["mul", "add"])
def test_identity_start_is_plain_cross_attention(fusion):
    module, plain = attention(fusion=fusion, init="identity"), attention(lam=False)
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if "lam" not in n})
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 8, 12)
    torch.testing.assert_close(module(x, memory), plain(x, memory))


def test_sample_without_a_key():
    module = attention()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 8, 12)
    key_mask = torch.tensor([[False], [True]]).expand(2, 8)
    out = module(x, memory, key_mask=key_mask)
    torch.testing.assert_close(out[0], module.out.bias.expand(5, 16))


def test_state_dict_is_stable():
    names = {"query", "key_value", "out", "lam.layers.0", "lam.layers.1", "lam.layers.2"}
    expected = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert set(attention().state_dict()) == expected


def lam(*sizes, **options):
    return LearnableAttentionMask(*sizes, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": lam(8, 9)}, "in_features 8 and max_len 9"),
        ({"lam": lam(9, 9, heads=2)}, "lam.heads must be 1, got 2"),
        ({"lam": lam(9, 9, activation="relu")}, "lam.activation must be None, got 'relu'"),
        ({"lam": lam(9, 9, fusion="gate", activation="relu")}, "lam.activation must be None"),
        ({"mask_heads": "all"}, "mask_heads must be one of"),
        ({"num_heads": 3}, "multiple of num_heads"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        LAMCrossAttention(**{"embed_dim": 16, "num_heads": 2} | options)


def test_bad_inputs_are_named():
    module = attention()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 8, 12)
    with pytest.raises(ValueError, match=r"x must be \[B, L, 16\]"):
        module(memory, memory)
    with pytest.raises(ValueError, match=r"memory must be \[B, L, 12\]"):
        module(x, x)
    with pytest.raises(ValueError, match=r"memory has 10 positions.*max_len=9"):
        module(x, torch.randn(2, 10, 12))
    with pytest.raises(ValueError, match="only a generator from max_len scores"):
        lam(8, 9).network(3)
