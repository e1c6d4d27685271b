"""LearnableAttentionMask: formula, slicing, starts, refusals, stable state_dict."""

import math

import pytest
import torch
import torch.nn.functional as F

from lam_kernels.nn import LearnableAttentionMask


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


def test_low_rank_is_refused_as_not_there_yet():
    with pytest.raises(NotImplementedError, match=r"low_rank.*not part of this version"):
        LearnableAttentionMask(4, 8, mask_form="low_rank")
    assert LearnableAttentionMask(4, 8, mask_form="dense")(torch.randn(1, 3, 4)).shape[-1] == 3


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
