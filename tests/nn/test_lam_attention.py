"""LAMSelfAttention: formula, masks from inside and outside, padding, gradients, refusals."""

import pytest
import torch

import lam_kernels
from lam_kernels import LowRankMask
from lam_kernels.nn import LAMSelfAttention, LearnableAttentionMask


def attention(backend=None, heads=2, fusion="mul", max_len=9, **options):
    torch.manual_seed(0)
    activation = "softplus" if fusion == "gate" else None
    lam = LearnableAttentionMask(16, max_len, fusion=fusion, activation=activation)
    return LAMSelfAttention(16, heads, lam=lam, backend=backend, **options)


def wake(module):
    """Gives every generator a last weight that is not 0."""
    for part in module.modules():
        if isinstance(part, LearnableAttentionMask):
            torch.nn.init.normal_(part.layers[-1].weight, std=0.3)
    return module


def by_hand(module, x, mask, key_mask=None):
    """The formulas of the docstring, spelt out per head."""
    query, key, value = (x @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=-1)
    width, heads = module.head_dim, []
    for head in range(module.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
        m = mask[:, min(head, mask.shape[1] - 1)]
        fused = {"mul": scores * m, "add": scores + m, "gate": scores + m.abs().log()}[
            module.fusion
        ]
        if key_mask is not None:
            fused = fused.masked_fill(~key_mask[:, None, :], -torch.inf)
        heads.append(torch.softmax(fused, dim=-1) @ value[..., part])
    return torch.cat(heads, dim=-1) @ module.out.weight.T + module.out.bias


@pytest.mark.parametrize("fusion", ["mul", "add"])
def test_a_mask_that_is_never_stored(backend, fusion):
    """From inside and from outside; the weights for looking at are those of the dense mask."""
    dense = wake(attention(backend, fusion=fusion))
    low = attention(backend, fusion=fusion)
    low.lam.mask_form = "low_rank"
    low.load_state_dict(dense.state_dict())
    x, key_mask = torch.randn(3, 7, 16), torch.arange(7)[None] < torch.tensor([[7], [4], [1]])
    torch.testing.assert_close(low(x, key_mask=key_mask), dense(x, key_mask=key_mask))
    mask = low.lam(x)
    assert isinstance(mask, LowRankMask)
    outside = LAMSelfAttention(16, 2, fusion=fusion, backend=backend)
    outside.load_state_dict({n: t for n, t in dense.state_dict().items() if "lam" not in n})
    torch.testing.assert_close(outside(x, mask=mask), dense(x))
    weights = [module.attention_weights(x, module.lam(x), key_mask) for module in (low, dense)]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
def test_formula(backend, fusion):
    module = wake(attention(backend, fusion=fusion))
    x, key_mask = torch.randn(3, 7, 16), torch.arange(7)[None] < torch.tensor([[7], [4], [1]])
    expected = by_hand(module, x, module.lam(x), key_mask)
    torch.testing.assert_close(module(x, key_mask=key_mask), expected)


@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
def test_identity_start_is_plain_attention(backend, fusion):
    module = attention(backend, fusion=fusion)
    x = torch.randn(2, 9, 16)
    plain = LAMSelfAttention(16, 2, backend=backend)
    plain.load_state_dict(
        {k: v for k, v in module.state_dict().items() if not k.startswith("lam.")}
    )
    torch.testing.assert_close(module(x), plain(x))


def test_a_mask_from_outside(backend):
    x, mask = torch.randn(2, 5, 16), torch.randn(2, 1, 5, 5, requires_grad=True)
    module = LAMSelfAttention(16, 4, backend=backend)
    out = module(x, mask=mask)
    torch.testing.assert_close(out, by_hand(module, x, mask))
    out.square().sum().backward()
    assert mask.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="own generator"):
        attention(backend)(x, mask=mask)


def test_gate_refuses_a_negative_mask(backend):
    module = LAMSelfAttention(16, 2, fusion="gate", backend=backend)
    x = torch.randn(1, 3, 16)
    module(x, mask=torch.tensor([[1.0, 0.0, 2.0]] * 3))
    with pytest.raises(ValueError, match="M >= 0"):
        module(x, mask=torch.tensor([[1.0, -0.5, 2.0]] * 3))


def test_gate_takes_anything_at_hidden_pairs(backend):
    module = LAMSelfAttention(16, 2, fusion="gate", backend=backend, pattern=lam_kernels.Causal())
    x, mask = torch.randn(1, 5, 16), torch.rand(5, 5)
    expected = module(x, mask=mask)
    mask[torch.ones(5, 5).triu(1) == 1] = -1.0
    assert torch.equal(module(x, mask=mask), expected)
    with pytest.raises(ValueError, match="M >= 0"):
        module(x, mask=-mask)
    with pytest.raises(ValueError, match="each axis"):
        module(x, mask=-torch.rand(5, 4))


@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_reach_every_parameter(backend, heads):
    torch.manual_seed(0)
    lam = LearnableAttentionMask(16, 6, depth=3, heads=heads)
    module = wake(LAMSelfAttention(16, 4, lam=lam, backend=backend))
    module(torch.randn(2, 6, 16)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_identity_start_leaves_itself(backend):
    torch.manual_seed(0)
    module = LAMSelfAttention(16, 4, lam=LearnableAttentionMask(16, 6, depth=3), backend=backend)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(2, 6, 16)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in module.lam.parameters())


@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
def test_padding_reaches_nothing(backend, fusion):
    module = wake(attention(backend, fusion=fusion))
    x, key_mask = torch.randn(2, 8, 16), torch.arange(8)[None] < torch.tensor([[8], [5]])
    other = torch.where(key_mask[..., None], x, 100 * torch.randn_like(x))
    results = []
    for tokens in (x, other):
        module.zero_grad()
        out = module(tokens, key_mask=key_mask)[key_mask]
        out.square().sum().backward()
        results.append([out, *[p.grad.clone() for p in module.parameters()]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    alone = module(x[1:, :5])
    torch.testing.assert_close(results[0][0][8:], alone[0])


def test_a_row_that_sees_no_key_gives_the_bias(backend):
    module = attention(backend)
    out = module(torch.randn(2, 3, 16), key_mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], module.out.bias.expand(3, 16))


def test_pattern_hides(backend):
    module = wake(attention(backend, pattern=lam_kernels.BlockDiagonal(3)))
    x = torch.randn(1, 9, 16)
    changed = x.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(module(x)[:, :3], module(changed)[:, :3])
    weights = module.attention_weights(x, module.lam(x))
    assert weights[..., :3, 3:].abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 9))


@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
def test_attention_weights_are_those_of_the_op(backend, fusion):
    module = wake(attention(backend, fusion=fusion))
    x, key_mask = torch.randn(2, 6, 16), torch.arange(6)[None] < torch.tensor([[6], [4]])
    weights = module.attention_weights(x, module.lam(x), key_mask)
    value = module.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (2, 8)).transpose(1, 2)
    expected = module.out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, key_mask=key_mask), expected)


def test_dropout_acts_in_training_only(backend):
    module = attention(backend, dropout=0.5)
    x = torch.randn(2, 9, 16)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(5)
    first = module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), module(x))


def test_autocast_keeps_parameter_gradients_in_fp32(backend):
    module = wake(attention(backend)).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(2, 9, 16, dtype=torch.float32))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_compiles_to_one_graph(backend):
    module = wake(attention(backend))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    assert module.lam.layers[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"num_heads": 0}, "multiple of num_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"fusion": "times"}, "fusion"),
        ({"lam": LearnableAttentionMask(8, 4)}, "in_features is 8"),
        ({"lam": LearnableAttentionMask(16, 4, heads=4)}, "lam.heads must be 1 or 2"),
        ({"lam": LearnableAttentionMask(16, 4), "fusion": "add"}, "built for 'mul'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LAMSelfAttention(**{"embed_dim": 16, "num_heads": 2, **options})


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"x must be \[B, L, 16\]"):
        attention()(torch.randn(5, 16))


def test_state_dict_is_stable():
    assert list(attention().state_dict()) == [
        "qkv.weight",
        "qkv.bias",
        "out.weight",
        "out.bias",
        "lam.layers.0.weight",
        "lam.layers.0.bias",
    ]
    assert list(LAMSelfAttention(16, 2, bias=False).state_dict()) == ["qkv.weight", "out.weight"]


def test_repr_says_what_matters():
    assert "num_heads=2, fusion='mul', backend='reference'" in repr(attention("reference"))


@pytest.mark.parametrize(("fusion", "hidden"), [("add", -torch.inf), ("gate", 0.0)])
def test_attention_weights_of_a_row_that_its_mask_hides_are_zero(fusion, hidden):
    module = LAMSelfAttention(16, 2, fusion=fusion)
    mask = torch.ones(2, 1, 5, 5)
    mask[:, :, 2] = hidden
    weights = module.attention_weights(torch.randn(2, 5, 16), mask=mask)
    assert torch.equal(weights[:, :, 2], torch.zeros(2, 2, 5))
    torch.testing.assert_close(weights[:, :, 3].sum(-1), torch.ones(2, 2))
