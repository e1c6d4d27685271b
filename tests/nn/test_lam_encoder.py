"""LAMEncoderLayer and LAMEncoder: both norms, both scopes, padding, stable state_dict."""

import pytest
import torch

from lam_kernels.nn import LAMEncoder, LAMEncoderLayer, LearnableAttentionMask


def wake(module):
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, LearnableAttentionMask):
            torch.nn.init.normal_(part.layers[-1].weight, std=0.3)
    return module


def test_pre_norm_formula_and_what_feeds_the_mask(backend):
    x = torch.randn(2, 5, 16)
    for mask_input in ("normed", "raw"):
        layer = wake(
            LAMEncoderLayer(
                16, 2, lam=LearnableAttentionMask(16, 5), mask_input=mask_input, backend=backend
            )
        )
        normed = layer.norm1(x)
        tokens = normed if mask_input == "normed" else x
        y = x + layer.attention(normed, mask_input=tokens)
        torch.testing.assert_close(layer(x), y + layer.feedforward(layer.norm2(y)))


def test_post_norm_formula(backend):
    layer = wake(
        LAMEncoderLayer(16, 2, lam=LearnableAttentionMask(16, 5), norm_first=False, backend=backend)
    )
    x = torch.randn(2, 5, 16)
    y = layer.norm1(x + layer.attention(x))
    torch.testing.assert_close(layer(x), layer.norm2(y + layer.feedforward(y)))


def test_global_scope_uses_one_mask_everywhere(backend):
    encoder = wake(LAMEncoder(3, 16, 2, 6, scope="global", backend=backend))
    x = torch.randn(2, 6, 16)
    mask = encoder.lam(x)
    y = x
    for layer in encoder.layers:
        y = layer(y, mask=mask)
    torch.testing.assert_close(encoder(x), encoder.norm(y))
    assert sum(isinstance(m, LearnableAttentionMask) for m in encoder.modules()) == 1


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_identity_start_is_the_plain_encoder(backend, scope, norm_first):
    options = {"norm_first": norm_first, "backend": backend}
    encoder = LAMEncoder(2, 16, 2, 6, scope=scope, **options)
    plain = LAMEncoder(2, 16, 2, **options)
    state = {k: v for k, v in encoder.state_dict().items() if ".lam." not in f".{k}"}
    plain.load_state_dict(state)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(encoder(x), plain(x))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("fill", [100.0, torch.nan])
def test_padding_reaches_nothing(backend, scope, norm_first, fill):
    encoder = wake(
        LAMEncoder(2, 16, 2, 8, scope=scope, norm_first=norm_first, mask_depth=2, backend=backend)
    )
    x, key_mask = torch.randn(2, 8, 16), torch.arange(8)[None] < torch.tensor([[8], [5]])
    results = []
    for tokens in (x, torch.where(key_mask[..., None], x, fill)):
        encoder.zero_grad()
        out = encoder(tokens, key_mask=key_mask)[key_mask]
        out.square().sum().backward()
        results.append([out, *[p.grad.clone() for p in encoder.parameters()]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(results[0][0][8:], encoder(x[1:, :5])[0])


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("fusion", "activation"), [("mul", None), ("add", None), ("gate", "relu")])
def test_gradients_reach_every_parameter(backend, scope, fusion, activation):
    encoder = wake(
        LAMEncoder(
            2,
            16,
            2,
            6,
            scope=scope,
            fusion=fusion,
            mask_depth=2,
            mask_heads=2,
            mask_activation=activation,
            backend=backend,
        )
    )
    torch.manual_seed(0)
    (encoder(torch.randn(2, 6, 16)) * torch.randn(2, 6, 16)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_mask_from_outside(backend):
    x, mask = torch.randn(2, 6, 16), torch.rand(6, 6)
    encoder = LAMEncoder(2, 16, 2, backend=backend)
    assert not torch.allclose(encoder(x, mask=mask), encoder(x))
    with pytest.raises(ValueError, match="LAM of scope 'layer'"):
        LAMEncoder(2, 16, 2, 6)(x, mask=mask)


def test_batch_mates_do_not_matter(backend):
    encoder = wake(LAMEncoder(2, 16, 2, 6, backend=backend))
    x = torch.randn(3, 6, 16)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


def test_compiles_to_one_graph(backend):
    encoder = wake(LAMEncoder(2, 16, 2, 6, backend=backend))
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x, key_mask = torch.randn(2, 6, 16), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    torch.testing.assert_close(compiled(x, key_mask=key_mask), encoder(x, key_mask=key_mask))


def test_state_dict_is_stable():
    layer = [
        *(f"norm1.{p}" for p in ("weight", "bias")),
        *(f"attention.{m}.{p}" for m in ("qkv", "out") for p in ("weight", "bias")),
        *(f"attention.lam.layers.0.{p}" for p in ("weight", "bias")),
        *(f"norm2.{p}" for p in ("weight", "bias")),
        *(f"feedforward.{i}.{p}" for i in (0, 3) for p in ("weight", "bias")),
    ]
    norm = ["norm.weight", "norm.bias"]
    keys = list(LAMEncoder(2, 16, 2, 6).state_dict())
    assert keys == [f"layers.{i}.{key}" for i in (0, 1) for key in layer] + norm
    keys = list(LAMEncoder(1, 16, 2, 6, scope="global").state_dict())
    own = [f"layers.0.{key}" for key in layer if ".lam." not in key]
    assert keys == ["lam.layers.0.weight", "lam.layers.0.bias", *own, *norm]
    assert "norm.weight" not in LAMEncoder(1, 16, 2, norm_first=False).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"scope": "all"}, "scope"),
        ({"mask_heads": 3}, "mask_heads"),
        ({"mask_input": "both"}, "mask_input"),
        ({"fusion": "gate"}, "M >= 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LAMEncoder(**{"num_layers": 1, "embed_dim": 16, "num_heads": 2, "max_len": 4, **options})


@pytest.mark.parametrize("key_mask", [torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool)])
def test_a_wrong_key_mask_is_named(key_mask):
    with pytest.raises(ValueError, match=r"key_mask must be bool \[2, 4\]"):
        LAMEncoder(1, 16, 2)(torch.randn(2, 4, 16), key_mask=key_mask)


def test_repr_says_what_matters():
    assert "scope='global'" in repr(LAMEncoder(1, 16, 2, 6, scope="global"))
