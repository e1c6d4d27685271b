"""LearnableAttentionMask: formula, slicing, starts, refusals, stable state_dict."""

import math

import pytest
import torch
import torch.nn.functional as F

import lam_kernels
from lam_kernels import LowRankMask
from lam_kernels.nn import LearnableAttentionMask
from lam_kernels.nn.learnable_attention_mask import COST, Cost


def test_formula_depth_3():
    lam = LearnableAttentionMask(6, 5, depth=3, hidden=4, init="paper", activation="tanh")
    x = torch.randn(2, 5, 6)
    (w1, b1), (w2, b2), (w3, b3) = [(layer.weight.T, layer.bias) for layer in lam.layers]
    hidden = F.relu(F.relu(x @ w1 + b1) @ w2 + b2)
    expected = torch.tanh(hidden @ w3 + b3)[:, None]
    torch.testing.assert_close(lam(x), expected)


def test_depth_1_is_one_linear_without_relu():
    lam = LearnableAttentionMask(6, 5, init="paper")
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(lam(x)[:, 0], x @ lam.layers[0].weight.T + lam.layers[0].bias)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_shorter_sequence_uses_the_first_columns(heads):
    lam = LearnableAttentionMask(6, 9, depth=2, heads=heads, init="paper")
    x = torch.randn(2, 9, 6)
    full, short = lam(x), lam(x[:, :4])
    assert full.shape == (2, heads, 9, 9)
    assert short.shape == (2, heads, 4, 4)
    assert short.stride(-1) == 1
    torch.testing.assert_close(short, full[:, :, :4, :4])


def test_each_row_depends_on_its_own_token_only():
    lam = LearnableAttentionMask(4, 6, depth=3, init="paper")
    x = torch.randn(1, 6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(lam(x)[0, 0, 2].sum(), x)
    assert gradient[0, 2].abs().sum() > 0
    assert gradient[0, [0, 1, 3, 4, 5]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("fusion", "activation", "value"),
    [
        ("mul", None, 1),
        ("mul", "relu", 1),
        ("mul", "softplus", 1),
        ("gate", "relu", 1),
        ("gate", "softplus", 1),
        ("add", None, 0),
        ("add", "tanh", 0),
    ],
)
def test_identity_start_is_exact(fusion, activation, value, dtype):
    for depth, heads in ((1, 1), (3, 2)):
        lam = LearnableAttentionMask(
            5, 67, depth, heads=heads, fusion=fusion, activation=activation, dtype=dtype
        )
        mask = lam(torch.randn(2, 67, 5, dtype=dtype))
        assert bool((mask == value).all())


@pytest.mark.parametrize(
    ("fusion", "activation"),
    [
        ("mul", "sigmoid"),
        ("mul", "tanh"),
        ("gate", "sigmoid"),
        ("add", "relu"),
        ("add", "softplus"),
        ("add", "sigmoid"),
    ],
)
def test_identity_start_is_refused_where_it_cannot_be(fusion, activation):
    with pytest.raises(ValueError, match=r"init='identity'.*cannot reach"):
        LearnableAttentionMask(5, 7, fusion=fusion, activation=activation)
    LearnableAttentionMask(5, 7, fusion=fusion, activation=activation, init="paper")


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_gate_needs_a_mask_that_cannot_be_negative(activation):
    with pytest.raises(ValueError, match=r"M >= 0.*relu.*softplus.*sigmoid"):
        LearnableAttentionMask(5, 7, fusion="gate", activation=activation, init="paper")


def test_inner_layers_start_with_he_variance_and_the_mask_still_depends_on_the_input():
    lam = LearnableAttentionMask(256, 8, depth=3)
    assert lam.layers[0].weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert lam.layers[1].bias.abs().max() == 0
    deep = LearnableAttentionMask(32, 32, depth=32)
    torch.nn.init.kaiming_normal_(deep.layers[-1].weight)
    spread = deep(torch.randn(64, 1, 32)).std(dim=0).mean()
    paper = LearnableAttentionMask(32, 32, depth=32, init="paper")
    assert spread > 1e-3 > 1e-6 > paper(torch.randn(64, 1, 32)).std(dim=0).mean()


def test_too_long_a_sequence_names_both_lengths():
    with pytest.raises(ValueError, match=r"9 positions.*max_len=8"):
        LearnableAttentionMask(4, 8)(torch.randn(1, 9, 4))


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 3), (1, 2, 5, 4)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"tokens must be \[B, L, 4\]"):
        LearnableAttentionMask(4, 8)(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"depth": 65}, "depth"),
        ({"depth": 1.5}, "depth"),
        ({"heads": 0}, "heads"),
        ({"hidden": 0}, "hidden"),
        ({"fusion": "times"}, "fusion"),
        ({"init": "zeros"}, "init"),
        ({"activation": "gelu"}, "activation"),
        ({"mask_form": "sparse"}, "mask_form"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LearnableAttentionMask(4, 8, **options)


# ---- mask_form


@pytest.mark.parametrize(("depth", "heads", "length"), [(1, 1, 9), (3, 1, 6), (2, 3, 9), (2, 3, 5)])
@pytest.mark.parametrize("fusion", ["mul", "add"])
def test_both_forms_are_one_mask(fusion, depth, heads, length):
    """The same values, the same gradients, the same state_dict."""
    torch.manual_seed(0)
    options = {"depth": depth, "hidden": 4, "heads": heads, "fusion": fusion, "init": "paper"}
    dense = LearnableAttentionMask(6, 9, **options, mask_form="dense").double()
    low = LearnableAttentionMask(6, 9, **options, mask_form="low_rank").double()
    low.load_state_dict(dense.state_dict())
    x = torch.randn(2, length, 6, dtype=torch.float64)
    query, key, value = torch.randn(3, 2, 3, length, 8, dtype=torch.float64)
    results = []
    for lam in (dense, low):
        tokens = x.clone().requires_grad_()
        mask = lam(tokens)
        out = lam_kernels.lam_attention(query, key, value, mask, fusion=fusion)
        wanted = [tokens, *lam.parameters()]
        results.append([out, *torch.autograd.grad(out.sin().sum(), wanted)])
    assert isinstance(mask, LowRankMask)
    assert mask.rank == (6 if depth == 1 else 4)
    assert mask.dense().shape == (2, heads, length, length)
    torch.testing.assert_close(mask.dense(), dense(x))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_low_rank_copies_nothing():
    lam = LearnableAttentionMask(6, 9, heads=3, mask_form="low_rank")
    x = torch.randn(2, 5, 6)
    mask = lam(x)
    last = lam.layers[-1]
    for factor, source in ((mask.rows, x), (mask.columns, last.weight), (mask.offset, last.bias)):
        assert factor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ((4, 8), {"activation": "relu"}, "needs activation=None, got 'relu'"),
        ((300, 8), {}, "rank of at most 256: in_features is 300"),
        ((4, 8), {"depth": 2, "hidden": 257}, "rank of at most 256: hidden is 257"),
    ],
)
def test_low_rank_that_cannot_be(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        LearnableAttentionMask(*sizes, **options, mask_form="low_rank")
    assert LearnableAttentionMask(*sizes, **options).form(torch.randn(1, 8, sizes[0])) == "dense"


def test_auto_follows_its_cost_rule(monkeypatch):
    """low_rank where bytes cost more than FLOPs, dense in cache, without a rank, elsewhere."""
    cost = Cost(flops_per_s=100.0, bytes_per_s=10.0, cache_bytes=1000)
    monkeypatch.setitem(COST, "cpu", cost)
    # per element of M: 6 x 4 bytes take 2.4 s, 2 x rank FLOPs rank / 50 s
    for rank, length, expected in ((119, 20, "low_rank"), (121, 20, "dense"), (1, 11, "dense")):
        lam = LearnableAttentionMask(rank, 20, dtype=torch.float32)
        tokens = torch.randn(1, length, rank, dtype=torch.float32)
        assert lam.form(tokens) == expected, rank
        assert isinstance(lam(tokens), LowRankMask) == (expected == "low_rank")
    tokens = torch.randn(1, 20, 4)
    assert LearnableAttentionMask(4, 20, init="paper", activation="tanh").form(tokens) == "dense"
    assert LearnableAttentionMask(4, 20, mask_form="dense").form(tokens) == "dense"
    assert LearnableAttentionMask(4, 20).form(tokens.to("meta")) == "dense"


def test_depth_64_and_empty_sequences():
    lam = LearnableAttentionMask(4, 8, depth=64)
    assert lam(torch.randn(2, 8, 4)).shape == (2, 1, 8, 8)
    assert lam(torch.randn(2, 0, 4)).shape == (2, 1, 0, 0)
    assert lam(torch.randn(0, 3, 4)).shape == (0, 1, 3, 3)


def test_state_dict_is_stable():
    lam = LearnableAttentionMask(6, 5, depth=3, hidden=4, heads=2)
    shapes = {name: tuple(value.shape) for name, value in lam.state_dict().items()}
    assert shapes == {
        "layers.0.weight": (4, 6),
        "layers.0.bias": (4,),
        "layers.1.weight": (4, 4),
        "layers.1.bias": (4,),
        "layers.2.weight": (10, 4),
        "layers.2.bias": (10,),
    }


def test_parameter_counts_of_the_papers():
    def count(lam):
        return sum(p.numel() for p in lam.parameters())

    assert count(LearnableAttentionMask(768, 197)) == 151_493  # ViT-B/16, a layer
    assert count(LearnableAttentionMask(32, 32, depth=32)) == 33_792


def test_repr_says_what_matters():
    text = repr(LearnableAttentionMask(6, 5, depth=2, fusion="gate", activation="relu"))
    assert "max_len=5, depth=2, hidden=6" in text
    assert "fusion='gate'" in text
    assert "'relu'" in text
