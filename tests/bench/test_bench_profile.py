"""Where a step's time goes: categories on made-up events and a real model, and what is refused."""

import gzip
import json
import time

import pytest
import torch
from torch import nn

import lam_kernels
from bench import profile, trace
from bench.__main__ import main
from bench.timing import CpuSampler
from bench.trace import CATEGORIES, Subject, attributed, profiled
from lam_kernels.nn import LAMSelfAttention, LearnableAttentionMask


class Event:
    """What attributed() reads of a profiler event."""

    device_type = torch.autograd.DeviceType.CPU

    def __init__(self, name, own, parent=None, *, number=-1, backward=False, thread=1):
        self.name, self.self_cpu_time_total, self.cpu_parent = name, own, parent
        self.self_device_time_total = 10 * own
        self.sequence_nr, self.thread, self.scope = number, thread, int(backward)
        self.fwd_thread = 1 if backward else 0


def _events():
    attention = Event("bench.attention", 1)
    linear = Event("bench.linear", 0, attention)
    core = Event("bench.core", 2, attention)
    generator = Event("bench.generator", 0, attention)
    inner = Event("bench.linear", 0, generator)
    step = Event("Optimizer.step#AdamW.step", 5)
    of_core = Event("autograd::engine::evaluate_function: _Forward", 1, number=7, backward=True)
    of_linear = Event("autograd::engine::evaluate_function: Addmm", 0, number=6, backward=True,
                      thread=9)  # fmt: skip
    return [
        attention, linear, core, generator, inner, step, of_core, of_linear,
        Event("aten::addmm", 100, linear, number=6),
        Event("aten::softmax", 200, core, number=7),
        Event("aten::bmm", 50, core, number=7),
        Event("aten::addmm", 30, inner, number=8),
        Event("aten::add", 7, attention, number=9),
        Event("aten::bmm", 400, of_core),
        Event("aten::mm", 250, of_linear, thread=9),
        Event("aten::mm", 60, Event("evaluate_function", 0, number=8, backward=True)),
        Event("aten::mul_", 40, step),
        Event("aten::copy_", 11),
        Event("aten::mm", 13),
        Event("aten::native_layer_norm", 17),
    ]  # fmt: skip


def test_each_operation_counts_once_under_its_range():
    found = attributed(_events(), on_device=False)
    assert found == {
        "attention forward": 2 + 200 + 50 + 7,
        "attention backward": 1 + 400,
        "mask generator": 30 + 60,
        "gemm": 100 + 250 + 13,
        "copies": 11,
        "optimizer": 5 + 40,
        "other": 1 + 17,
    }
    assert sum(found.values()) == sum(e.self_cpu_time_total for e in _events())


def test_on_a_device_its_kernels_time_is_what_counts():
    assert attributed(_events(), on_device=True)["copies"] == 110


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lam = LearnableAttentionMask(16, 24)
        self.attention = LAMSelfAttention(16, 2, lam=self.lam, backend="reference")
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.attention(x))


def test_a_real_step_is_split_into_its_parts(tmp_path):
    torch.manual_seed(0)
    made = profile.subject((_Layer(), torch.randn(2, 24, 16)), "cpu")
    path = tmp_path / "trace.json.gz"
    found = profiled("before", made, steps=2, device="cpu", trace=path)
    for kind in ("attention forward", "attention backward", "mask generator", "gemm", "optimizer"):
        assert found.parts_ms[kind] > 0, kind
    assert set(found.parts_ms) == set(CATEGORIES)
    assert found.wall_ms > 0
    assert found.peak_mib > 0
    assert all(a[0] <= b[0] for a, b in zip(found.timeline, found.timeline[1:], strict=False))
    with gzip.open(path, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"bench.core", "bench.generator", "bench.linear", "[memory]"} <= names
    assert lam_kernels.lam_attention.__module__ == "lam_kernels.ops.masked_attention"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.module.modules())


def test_before_and_after_are_timed_in_turns_and_disturbed_steps_are_dropped(monkeypatch):
    """Of twenty-odd steps, of which two were made slow by other work."""
    clock = {"now": 0.0, "waited": 0, "calls": 0}

    def step(seconds):
        def call():
            clock["calls"] += 1
            late = 1.0 if clock["calls"] in (7, 10) else 0.0
            clock["now"] += seconds + late
            clock["waited"] += round(late * 1e9)

        return call

    def sampler():
        return CpuSampler(clock=lambda: clock["now"], delay=lambda: {1: clock["waited"]})

    monkeypatch.setattr(trace.timing, "CpuSampler", sampler)
    subjects = {"before": Subject(step(0.04)), "after": Subject(step(0.02))}
    times = trace.whole_steps(subjects, 3, "cpu")
    assert [len(one.disturbed) for one in times.values()] == [1, 1]
    profiles = [
        trace.Profile(name, one, dict.fromkeys(CATEGORIES, 1.0), 1.0, waited=share)
        for (name, one), share in zip(times.items(), (0.0, 0.5), strict=True)
    ]
    text = profile.timed(profiles, in_turns=True)
    assert "the step takes 0.50 (0.50 .. 0.50) of what it took before" in text
    assert ", 2 dropped because other work ran" in text
    assert "in the profile of after other work kept our threads waiting, 50% of its time" in text
    table = profile.table(profiles)
    assert "40.00 .. 40.00" in table
    assert "the step takes 0.50 of" in profile.timed(profiles, in_turns=False)


def test_time_in_which_nothing_runs_is_a_gap():
    x = torch.randn(64, 64)

    def step():
        x @ x
        time.sleep(0.05)

    found = profiled("idle", Subject(step), steps=2, device="cpu", trace=None)
    assert found.parts_ms["gaps"] > 0.6 * found.wall_ms
    assert found.wall_ms == pytest.approx(sum(found.parts_ms.values()), rel=0.3)


MODULE = """
import collections
import torch
from torch import nn
import lam_kernels
from lam_kernels import masked_attention

class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.backend = None if fused else "reference"

    def forward(self, x):
        query, key, value = self.qkv(x).view(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return lam_kernels.masked_attention(query, key, value, backend=self.backend)

def make(fused):
    return Attention(fused), torch.randn(2, 12, 8)

def plain():
    return nn.Linear(4, 4), {"input": torch.randn(3, 4)}, lambda out: out.square().mean()

def step():
    x = torch.randn(8, 8, requires_grad=True)
    return lambda: x.square().sum().backward()

def layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return layer, torch.randn(2, 9, 16)

def dictionary():
    return {"model": 1}

class Plain(nn.Module):  # calls the op by a name of its own, in no module of that name
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.qkv(x).view(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return masked_attention(query, key, value)

def plain_name():
    return Plain(), torch.randn(2, 12, 8)

shared = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

def the_same_again():
    return shared, torch.randn(2, 9, 16)

def needs_more(size):
    return layers()

def breaks():
    raise RuntimeError("no data\\nhere")

def misfit():
    return nn.Linear(4, 4), torch.randn(3, 5)

def no_parameters():
    return nn.ReLU(), torch.randn(3, 5)

def no_loss():
    return nn.Linear(4, 4), torch.randn(3, 4), 3

def no_gradient():
    return nn.Linear(4, 4), torch.randn(3, 4), lambda out: out.detach().sum()

def mapping():
    return nn.Linear(4, 4), collections.UserDict(input=torch.randn(3, 4))

number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "profiled_by_a_user.py").write_text(MODULE)
    (tmp_path / "broken_by_a_user.py").write_text("import os\ndef make(:\n")
    (tmp_path / "leaving_by_a_user.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_users_function_before_and_after(user_module, capsys):
    arguments = ["--steps", "1", "--threads", "1", "--output", "found"]
    assert main(["profile", "profiled_by_a_user:make", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| ms a step" in printed
    assert "before" in printed
    assert "after" in printed
    assert "the step takes" in printed
    names = {path.name for path in (user_module / "found").iterdir()}
    assert names == {"before.json.gz", "after.json.gz", "profile.png", "memory.png"}


def test_swap_makes_the_second_of_a_model_that_knows_nothing_of_it(user_module, capsys):
    why_not = lam_kernels.backends()["cpu"]
    if why_not:
        pytest.skip(f"backend cpu: {why_not}")
    arguments = ["--steps", "1", "--threads", "1", "--output", "found"]
    assert main(["profile", "profiled_by_a_user:layers", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "note: swap() changed 1 modules" in printed
    assert "the step takes" in printed
    with gzip.open(user_module / "found" / "after.json.gz", "rt") as file:
        assert "bench.core" in file.read()


def test_the_op_by_a_users_own_name_is_attention(user_module, capsys):
    why_not = lam_kernels.backends()["cpu"]
    if why_not:
        pytest.skip(f"backend cpu: {why_not}")
    made = profile.subject(profile.load("profiled_by_a_user:plain_name")(), "cpu")
    found = profiled("before", made, steps=2, device="cpu", trace=None)
    assert found.parts_ms["attention forward"] > 0
    assert found.parts_ms["attention backward"] > 0


def test_a_function_that_returns_one_model_twice_is_swapped_after_it_was_measured(user_module):
    why_not = lam_kernels.backends()["cpu"]
    if why_not:
        pytest.skip(f"backend cpu: {why_not}")
    arguments = ["--steps", "1", "--threads", "1", "--output", "found"]
    assert main(["profile", "profiled_by_a_user:the_same_again", *arguments]) == 0
    for name, fused in (("before", False), ("after", True)):
        with gzip.open(user_module / "found" / f"{name}.json.gz", "rt") as file:
            assert ("lam_kernels::" in file.read()) == fused


@pytest.mark.parametrize("function", ["plain", "step", "mapping"])
def test_what_cannot_be_fused_is_profiled_as_it_is(user_module, capsys, function):
    arguments = ["--steps", "1", "--output", "found", "--no-trace"]
    assert main(["profile", f"profiled_by_a_user:{function}", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "note: only before" in printed
    assert "after" not in printed.split("note:")[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such_module:make"], "No module named 'no_such_module'"),
        (["profiled_by_a_user"], "expected module:function"),
        ([".profiled_by_a_user:make"], "expected module:function"),
        (["profiled_by_a_user:number"], "has no function number"),
        (["profiled_by_a_user:dictionary"], "returned dict: expected a step to call"),
        (["profiled_by_a_user:needs_more"], "missing 1 required positional argument: 'size'"),
        (["profiled_by_a_user:breaks"], "raised RuntimeError: no data here (profiled_by_a_user.py"),
        (["profiled_by_a_user:misfit"], "a step of profiled_by_a_user:misfit raised RuntimeError"),
        (["profiled_by_a_user:no_parameters"], "no parameter to train"),
        (["profiled_by_a_user:no_loss"], "a loss that is no function: 3"),
        (["profiled_by_a_user:no_gradient"], "does not require grad"),
        (["broken_by_a_user:make"], "(broken_by_a_user.py, line 2)"),
        (["leaving_by_a_user:make"], "importing leaving_by_a_user raised SystemExit"),
        (["profiled_by_a_user:make", "--steps", "0"], "at least 1"),
        (["--tool", "ncu"], "--tool ncu needs --device cuda"),
    ],
)
def test_refusals(user_module, capsys, arguments, sentence):
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error


def test_ranges_of_the_attention_functions_are_taken_back():
    before = nn.functional.scaled_dot_product_attention
    with trace.ranges(None):
        assert nn.functional.scaled_dot_product_attention is not before
    assert nn.functional.scaled_dot_product_attention is before


def test_ncu_runs_where_the_users_module_and_the_output_are(user_module, monkeypatch, capsys):
    """With a program in ncu's place that runs what comes after its own options."""
    ran = []

    class Done:
        returncode = 0

    def run(command, **options):
        ran.append((command, options))
        return Done()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile.subprocess, "run", run)
    arguments = ["--device", "cuda", "--tool", "ncu", "--threads", "1", "--output", "found"]
    assert main(["profile", "profiled_by_a_user:make", *arguments]) == 0
    ((command, options),) = ran
    assert options.get("cwd") is None
    assert (user_module / "found").is_dir()
    assert command[command.index("-o") + 1] == "found/ncu"
    assert command[command.index("--threads") + 1] == "1"
    tree = str(profile.record.tree())
    assert options["env"]["PYTHONPATH"].split(profile.os.pathsep)[0] == tree
