"""python -m lam_kernels swap module:function."""

import re

import pytest
import torch

import lam_kernels.__main__ as command

FACTORY = """
import torch
from torch import nn

def build():
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 6, 16)

def model_only():
    return build()[0]

def mixed():
    served, stays = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2, add_zero_attn=True)
    return nn.ModuleList([served, stays])

def padded():
    padding = torch.tensor([[True, False, False, False, False, False]] * 2)
    return build()[0], {"src": build()[1], "src_key_padding_mask": padding}

def frozen():
    return build()[0].requires_grad_(False), build()[1]

def misfit():
    return build()[0], torch.randn(2, 6, 15)

def nothing():
    return nn.Linear(2, 2)

def wrong():
    return 3

def broken():
    raise ZeroDivisionError

def sized(width, *, depth):
    raise ZeroDivisionError

number = 3
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    (tmp_path / "somebodys_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "somebodys_models", raising=False)

    def run(line: str) -> tuple[int, str, str]:
        code = command.main(["swap", *line.split()])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_report_check_and_gain(call):
    code, out, _ = call("somebodys_models:build --steps 2 --threads 1")
    assert code == 0
    assert "2 attention modules fused, 0 stay" in out
    assert "the same function as the untouched model" in out
    assert "training step (forward, backward, AdamW), median of 2, 1 threads" in out
    assert re.search(r"[\d.]+ ms before, [\d.]+ ms after, [\d.]+ x the speed \(quartiles", out)


def test_a_learned_mask(call):
    code, out, _ = call("somebodys_models:build --steps 1 --learned-mask 8 --fusion add")
    assert code == 0
    assert "learned mask (layer, add)" in out


def test_without_a_batch_there_is_only_the_report(call):
    code, out, _ = call("somebodys_models:model_only")
    assert code == 0
    assert "nothing checked, nothing timed" in out


@pytest.mark.filterwarnings("error")
def test_nothing_to_swap(call):
    code, out, _ = call("somebodys_models:nothing")
    assert code == 0
    assert out.count("no attention module found") == 1


def test_a_swap_that_is_wrong_exits_with_1(call, monkeypatch):
    import lam_kernels

    right = lam_kernels.masked_attention
    monkeypatch.setattr(
        lam_kernels, "masked_attention", lambda q, k, v, **o: 1.001 * right(q, k, v, **o)
    )
    code, out, _ = call("somebodys_models:build --steps 1")
    assert code == 1
    assert "NOT the same function" in out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("somebodys_models", "must be MODULE:FUNCTION"),
        (".somebodys_models:build", "must be MODULE:FUNCTION"),
        ("no_such_module:build", "there is no module no_such_module"),
        ("somebodys_models:missing", "somebodys_models has no function missing"),
        ("somebodys_models:number", "somebodys_models has no function number"),
        ("somebodys_models:sized", "without arguments: missing a required argument: 'width'"),
        ("somebodys_models:wrong", "must return a torch.nn.Module"),
        ("somebodys_models:build --backend fast", "backend must be one of cpu"),
        ("somebodys_models:build --learned-mask 0", "max_len must be an integer"),
        ("somebodys_models:build --steps 0", "--steps must be at least 1"),
        ("somebodys_models:build --threads 0", "--threads must be at least 1"),
        ("somebodys_models:mixed --strict", "add_zero_attn=True"),
    ],
)
def test_mistakes_are_one_sentence(call, line, sentence):
    code, out, err = call(line)
    assert (code, out) == (2, "")
    assert err.startswith("lam_kernels: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("build --learned-mask 3", "tokens has 6 positions"),
        ("padded --learned-mask 6", "Pad on the right"),
        ("frozen", "no tensor with a gradient"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence_below_the_report(call, line, sentence):
    code, out, err = call(f"somebodys_models:{line}")
    assert code == 2
    assert "2 attention modules fused" in out
    assert err.startswith("lam_kernels: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("function", "error"), [("broken", ZeroDivisionError), ("misfit", AssertionError)]
)
def test_an_error_of_the_factory_is_its_own(call, function, error):
    with pytest.raises(error) as found:
        call(f"somebodys_models:{function}")
    assert not any("torch_modules" in str(entry.path) for entry in found.traceback)


def test_weights_are_as_before(tmp_path):
    from lam_kernels.swap import swap
    from lam_kernels.swap.timing import step_times

    model = torch.nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = swap(model)
    assert step_times(report, torch.randn(2, 6, 16), 1).after_ms > 0
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
