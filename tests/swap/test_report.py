"""swap() itself: the report as data, undo to the bit, nesting, strictness, refusals."""

import copy
import pickle

import pytest
import torch
from encoder_model import NAMES, Model, inputs
from torch import nn

from lam_kernels import Toeplitz
from lam_kernels.nn import LAMSelfAttention
from lam_kernels.swap import LearnedMask, swap
from lam_kernels.swap.report import SwapError


class OddAttention(nn.Module):
    def forward(self, x):
        return x


class OwnAttention(nn.MultiheadAttention):
    pass


def state(model):
    """Everything of every module that a swap could leave behind, by identity."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (type(module), id(module))
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                value = tuple((k, id(v)) for k, v in value.items())
            found[name, key] = value if isinstance(value, tuple | bool | int | float) else id(value)
    return found


def test_report_is_data_and_a_table():
    model = Model()
    report = swap(model)
    assert report.changed == dict.fromkeys(NAMES, "masked_attention")
    assert report.skipped == {}
    assert str(report).splitlines() == [
        "Model: 2 attention modules fused, 0 stay",
        "| module                     | now   | how, or why not  |",
        "| -------------------------- | ----- | ---------------- |",
        "| encoder.layers.0.self_attn | fused | masked_attention |",
        "| encoder.layers.1.self_attn | fused | masked_attention |",
    ]


@pytest.mark.parametrize("learned", [None, LearnedMask(8), LearnedMask(8, scope="global")])
@pytest.mark.parametrize("pattern", [None, Toeplitz(2)])
def test_undo_restores_everything(learned, pattern):
    model = Model().eval()
    batch = inputs()
    calls = []
    model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = [id(p) for p in model.parameters()]
    before, values = state(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(**batch)
    report = swap(model, learned_mask=learned, patterns=pattern)
    assert state(model) != before
    model(**batch)
    assert len(calls) == 2  # hooks stay and run
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == parameters
    report.undo()
    assert state(model) == before
    assert [id(p) for p in model.parameters()] == parameters
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])
    with torch.no_grad():
        assert torch.equal(model(**batch), expected)


def test_undo_keeps_what_was_trained():
    model, batch = Model(), inputs()
    report = swap(model, learned_mask=LearnedMask(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch).square().mean().backward()
    optimizer.step()
    trained = {k: v.clone() for k, v in model.state_dict().items() if ".lam." not in k}
    lam = copy.deepcopy(model.encoder.layers[0].self_attn.lam.state_dict())
    report.undo()
    assert list(model.state_dict()) == list(trained)
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained[key])
    report.apply()  # and back, with the mask as it was
    for key, value in model.encoder.layers[0].self_attn.lam.state_dict().items():
        assert torch.equal(value, lam[key])


def test_checkpoints_load_both_ways():
    plain, swapped = Model(), Model()
    swap(swapped)
    assert list(plain.state_dict()) == list(swapped.state_dict())
    swapped.load_state_dict(plain.state_dict())
    plain.load_state_dict(swapped.state_dict())
    masked = Model()
    swap(masked, learned_mask=LearnedMask(8))
    added = set(masked.state_dict()) - set(plain.state_dict())
    assert added == {f"{n}.lam.layers.0.{p}" for n in NAMES for p in ("weight", "bias")}
    assert not masked.load_state_dict(plain.state_dict(), strict=False).unexpected_keys


def test_context_manager():
    model = Model()
    before = state(model)
    with swap(model) as report:
        assert state(model) != before
        assert report.changed
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), swap(model):
        raise ZeroDivisionError
    assert state(model) == before
    with swap(model) as report:
        report.undo()  # by hand: the end of the block has nothing left to do
    with pytest.raises(RuntimeError, match="undone already"):
        report.undo()
    report.apply()
    with pytest.raises(RuntimeError, match="in place already"):
        report.apply()


def test_nested_swaps_are_undone_in_order(spy):
    model, batch = Model().eval(), inputs()
    before = state(model)
    outer = swap(model, backend="reference", patterns=Toeplitz(3))
    between = state(model)
    inner = swap(model, backend="cpu", learned_mask=LearnedMask(8))
    with spy() as seen:
        model(**batch)
    assert seen.backends == {"cpu"}
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn was swapped again later"):
        outer.undo()
    third = swap(model)  # names nothing: keeps the backend, the pattern and the learned mask
    settings = model.encoder.layers[0].self_attn.lam_swap
    assert (settings.backend, settings.pattern) == ("cpu", Toeplitz(3))
    assert settings.source is not None
    third.undo()
    inner.undo()
    assert state(model) == between
    outer.undo()
    assert state(model) == before


def test_a_class_changed_since_is_not_taken_back():
    model = Model()
    report = swap(model)
    attention = model.encoder.layers[0].self_attn
    attention.__class__ = type("Sharded", (type(attention),), {})
    with pytest.raises(RuntimeError, match="SwappedMultiheadAttention became a Sharded"):
        report.undo()


def test_a_forward_replaced_since_is_to_be_removed_first():
    """accelerate's hooks keep the forward of the class that a module has when they come."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    hooks = accelerate.hooks
    model, batch = Model().eval(), inputs()
    before, expected = state(model), model(**batch)
    report = swap(model)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    between = state(model)
    for taking_back in (report.undo, lambda: report.check(batch)):
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn: its forward was replaced"):
            taking_back()
        assert state(model) == between
    hooks.remove_hook_from_module(model, recurse=True)
    report.undo()
    assert {k: v for k, v in state(model).items() if k in before} == before
    assert torch.equal(model(**batch), expected)
    hooks.add_hook_to_module(model.encoder.layers[0].self_attn, hooks.ModelHook())
    with pytest.raises(RuntimeError, match=r"its forward was replaced"):
        report.apply()


def test_a_second_learned_mask_is_not_taken():
    model = Model()
    swap(model, learned_mask=LearnedMask(8))
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(model, learned_mask=LearnedMask(8))
    assert set(report.skipped.values()) == {"it has a learned mask from an earlier swap"}


def test_parts_of_a_model():
    model = Model()
    report = swap(model.encoder.layers[1])
    assert list(report.changed) == ["self_attn"]
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    alone = nn.MultiheadAttention(16, 2)
    assert list(swap(alone).changed) == [""]
    assert "| SwappedMultiheadAttention | fused" in str(swap(alone))


def test_nothing_to_swap_says_so():
    with pytest.warns(UserWarning, match="Linear: no attention module found"):
        report = swap(nn.Linear(2, 2))
    assert (report.changed, report.skipped) == ({}, {})
    with pytest.raises(SwapError, match="no attention module found"):
        swap(nn.Linear(2, 2), strict=True)


def test_everything_that_stays_is_named():
    model = nn.ModuleDict(
        {
            "fine": nn.MultiheadAttention(16, 2),
            "kv": nn.MultiheadAttention(16, 2, add_bias_kv=True),
            "zero": nn.MultiheadAttention(16, 2, add_zero_attn=True),
            "wide": nn.MultiheadAttention(600, 2),
            "own": OwnAttention(16, 2),
            "odd": OddAttention(),
            "ours": LAMSelfAttention(16, 2),
            "hooked": nn.MultiheadAttention(16, 2),
            "integers": nn.MultiheadAttention(16, 2),
        }
    )
    model["hooked"].forward = model["hooked"].forward
    model["integers"].requires_grad_(False)
    for parameter in model["integers"].parameters():
        parameter.data = parameter.data.to(torch.int8)
    before = state(model)
    with pytest.raises(SwapError, match="strict=True"):
        swap(model, strict=True)
    assert state(model) == before
    report = swap(model)
    assert list(report.changed) == ["fine"]
    expected = {
        "kv": "add_bias_kv=True",
        "zero": "add_zero_attn=True",
        "wide": "head dim is 300",
        "own": "subclass of nn.MultiheadAttention",
        "odd": "OddAttention is not known to lam_kernels",
        "ours": "has the fused op already",
        "hooked": "its forward was replaced on the instance",
        "integers": "its weights are torch.int8",
    }
    assert set(report.skipped) == set(expected)
    for name, reason in expected.items():
        assert reason in report.skipped[name], name


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_a_scripted_model_cannot_be_swapped():
    pytest.importorskip("transformers", reason="only then is every module looked at")
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model is a RecursiveScriptModule, .* cannot be swapped"):
        swap(scripted)
    beside = nn.ModuleList([scripted, nn.MultiheadAttention(16, 2)])
    assert list(swap(beside).changed) == ["1"]


def test_the_dense_layer_behind_an_attention_is_none():
    class OddAttentionOutput(nn.Linear):
        pass

    model = nn.ModuleList([OddAttention(), OddAttentionOutput(2, 2), nn.MultiheadAttention(16, 2)])
    assert list(swap(model).skipped) == ["0"]


def test_a_backend_that_cannot_serve_is_the_reason():
    missing = [name for name, why in __import__("lam_kernels").backends().items() if why]
    if not missing:
        pytest.skip("every backend is available here")
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(Model(), backend=missing[0])
    assert all(missing[0] in why for why in report.skipped.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learned_mask": 8}, "learned_mask must be a LearnedMask or None, got int"),
        ({"learned_mask": {"nothing.*": None}}, "learned_mask: no attention module is called 'not"),
        ({"learned_mask": {"*": 8}}, r"learned_mask\['\*'\] must be a LearnedMask .* got int"),
        ({"patterns": {0: None}}, "patterns: no attention module is called 0"),
        ({"patterns": "Causal"}, "patterns must be"),
        ({"patterns": {"nothing.*": Toeplitz(1)}}, "no attention module is called 'nothing"),
        ({"patterns": {"encoder.layers.0": Toeplitz(1)}}, "no attention module is called 'enc"),
        ({"patterns": [Toeplitz(1), "x"]}, "patterns must be .* got list of Toeplitz, str"),
        ({"patterns": {"encoder.*": 5}}, r"patterns\['encoder.\*'\] must be .* got int"),
        ({"backend": "fast"}, "backend must be one of cpu"),
        ({"backend": ["cpu"]}, "backend must be one of cpu"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        swap(Model(), **options)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        swap([])


def test_patterns_by_name_and_by_head():
    model, batch = Model().eval(), inputs()
    report = swap(model, patterns={"encoder.layers.0.*": [Toeplitz(1), None, None, Toeplitz(2)]})
    assert report.changed[NAMES[0]] == "masked_attention; pattern"
    assert report.changed[NAMES[1]] == "masked_attention"
    assert torch.isfinite(model(**batch)).all()
    report.undo()
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap(model, patterns=[Toeplitz(1), None])
    assert "expected one for each of 4 heads" in report.skipped[NAMES[0]]


def test_a_mask_goes_where_its_module_went():
    model, batch = Model(), inputs()
    report = swap(model, learned_mask=LearnedMask(8))
    masks = report.learned_parameters()
    report.undo()
    model.double()
    batch["x"] = batch["x"].double()
    expected = model(**batch)
    report.apply()
    torch.testing.assert_close(model(**batch), expected)
    assert [id(p) for p in report.learned_parameters()] == [id(p) for p in masks]
    assert {p.dtype for p in masks} == {torch.float64}
    attention = model.encoder.layers[0].self_attn
    attention.lam.float()  # whoever wants it otherwise gets it back so
    with report.taken_out():
        pass
    assert attention.lam.layers[0].weight.dtype == torch.float32


def test_copies_and_pickles(spy):
    model, batch = Model().eval(), inputs()
    swap(model, learned_mask=LearnedMask(8, scope="global"))
    expected = model(**batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with spy() as seen:
            assert torch.equal(other(**batch), expected)
        assert seen.forwards == 2


# ---- check
