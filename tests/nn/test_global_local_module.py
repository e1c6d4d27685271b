"""GlobalLocalAttention: the formulas of its docstring, sizes, padding, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lam_kernels import BlockDiagonal, Toeplitz
from lam_kernels.nn import GlobalLocalAttention, LAMSelfAttention

DIM, HEADS, L = 12, 4, 9
VARIANTS = ("share", "gate_map", "gate_output")


def module(variant, **options):
    torch.manual_seed(0)
    given = {"max_len": 11} if variant == "gate_map" else {}
    made = GlobalLocalAttention(
        DIM, HEADS, Toeplitz(2), variant, dtype=torch.float64, **given | options
    )
    for name, parameter in made.named_parameters():
        if "gate" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def by_hand(attention, x, key_mask):
    whole, near = attention.attention_maps(x, key_mask)
    _, _, value = attention._project(x)
    flat = lambda o: o.transpose(1, 2).flatten(2)  # noqa: E731
    if attention.variant == "share":
        maps = torch.cat([whole[:, : HEADS // 2], near[:, HEADS // 2 :]], 1)
        return attention.out(flat(maps @ value))
    if attention.variant == "gate_map":
        gates = attention.gate_global[:L, :L], attention.gate_local[:L, :L]
        R = torch.sigmoid(whole @ gates[0] - near @ gates[1])
        return attention.out(flat((R * whole + (1 - R) * near) @ value))
    Og, Ol = flat(whole @ value), flat(near @ value)
    R = torch.sigmoid(attention.gate_global(Og) - attention.gate_local(Ol))
    mixed = R * F.linear(Og, attention.out.weight) + (1 - R) * attention.out_local(Ol)
    return mixed + attention.out.bias


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula(variant, masked, backend):
    attention = module(variant, backend=backend)
    x = torch.randn(2, L, DIM, dtype=torch.float64, requires_grad=True)
    key_mask = torch.arange(L) < torch.tensor([[6], [0]]) if masked else None
    y, expected = attention(x, key_mask=key_mask), by_hand(attention, x, key_mask)
    torch.testing.assert_close(y, expected)
    wanted = [x, *attention.parameters()]
    seed = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, wanted, seed), torch.autograd.grad(expected, wanted, seed),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant):
    attention = module(variant)
    x = torch.randn(1, L, DIM, dtype=torch.float64)
    longer = torch.cat([x, torch.randn(1, 2, DIM, dtype=torch.float64)], 1)
    key_mask = (torch.arange(L + 2) < L)[None]
    torch.testing.assert_close(attention(longer, key_mask=key_mask)[:, :L], attention(x))


def test_without_a_pattern_it_is_plain_attention():
    torch.manual_seed(0)
    plain = LAMSelfAttention(DIM, HEADS)
    ours = GlobalLocalAttention(DIM, HEADS, None)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, L, DIM)
    assert torch.equal(ours(x), plain(x))


def test_gates_start_half_open():
    attention = GlobalLocalAttention(DIM, HEADS, Toeplitz(2), "gate_map", 11)
    x = torch.randn(2, L, DIM)
    whole, near = attention.attention_maps(x)
    _, _, value = attention._project(x)
    out = ((whole + near) / 2 @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.out(out))


def count(variant, dim, **options):
    made = GlobalLocalAttention(dim, 8, BlockDiagonal(20), variant, device="meta", **options)
    return sum(p.numel() for p in made.parameters())


def test_parameter_counts():
    """What each variant adds to plain attention, at the paper's sizes."""
    for dim in (1024, 128):
        plain = count("share", dim)
        assert plain == 4 * dim**2 + 4 * dim
        assert count("gate_map", dim, max_len=300) - plain == 2 * 300**2
        assert count("gate_output", dim) - plain == 3 * dim**2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"variant": "gate"}, ValueError, "variant must be one of"),
        ({"heads": 5}, ValueError, "dim must be a multiple of heads, got 12 and 5"),
        ({"heads": 3}, ValueError, "even number of heads, got 3"),
        ({"pattern": "local"}, TypeError, "pattern must be a pattern or None, got str"),
        ({"pattern": None, "variant": "gate_output"}, ValueError, "needs a pattern"),
        ({"variant": "gate_map"}, ValueError, "max_len from 1 to 512, got None"),
        ({"variant": "gate_map", "max_len": 513}, ValueError, "max_len from 1 to 512, got 513"),
        ({"variant": "gate_map", "max_len": "300"}, ValueError, "max_len from 1 to 512, got '300'"),
        ({"variant": "gate_map", "max_len": 30.0}, ValueError, "integer max_len .* got 30.0"),
        ({"renormalise": True}, ValueError, "renormalise is for 'gate_map'"),
    ],
)
def test_refusals(changes, error, words):
    with pytest.raises(error, match=words):
        GlobalLocalAttention(**{"dim": 12, "heads": 4, "pattern": Toeplitz(2), **changes})


def test_refused_input():
    attention = module("gate_map")
    with pytest.raises(ValueError, match="x has 12 positions, max_len is 11"):
        attention(torch.randn(1, 12, DIM, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be \[B, L, 12\]"):
        attention(torch.randn(1, 5, 13, dtype=torch.float64))
