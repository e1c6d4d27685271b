"""Patterns in models that exist: which modules one for all is meant for, and caches."""

import pytest
import torch
from tiny_models import batch, build
from torch import nn

from lam_kernels import BlockDiagonal, Toeplitz
from lam_kernels.swap import swap


def test_a_pattern_for_all_is_not_for_cross_attention():
    """What a module is called does not say that it is one: its first call does."""
    model = nn.ModuleDict({"read": nn.MultiheadAttention(12, 3, batch_first=True)}).double()
    query, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    with swap(model, patterns=Toeplitz(1)), pytest.raises(ValueError, match=(
        r"read was called with 5 queries and 7 keys, .* patterns=\{'read': None, '\*': ...\}"
    )):  # fmt: skip
        model["read"](query, memory, memory, need_weights=False)
    expected = model["read"](query, memory, memory, need_weights=False)[0]
    with swap(model, patterns={"read": None, "*": Toeplitz(1)}):
        torch.testing.assert_close(
            model["read"](query, memory, memory, need_weights=False)[0], expected
        )
    hidden = torch.ones(5, 7).tril(3).triu(1) == 0
    expected = model["read"](query, memory, memory, attn_mask=hidden, need_weights=False)[0]
    with swap(model, patterns={"read": Toeplitz(1)}):  # asked for by name: from the last key on
        torch.testing.assert_close(
            model["read"](query, memory, memory, need_weights=False)[0], expected
        )


def decoder(name):
    """A small causal model, or an encoder and a decoder, that generates with a cache."""
    t = pytest.importorskip("transformers", reason="transformers is not installed")
    common = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"pad_token_id": 0}
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    few = {"num_key_value_heads": 2, "intermediate_size": 32}
    parts = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "d_model": 32}
    parts |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    made = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(**common, n_embd=32, n_layer=1, n_head=4, n_positions=32)
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**common, **small, **few)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**common, **small, **few)),
        "bert": lambda: t.BertLMHeadModel(
            t.BertConfig(**common, **small, intermediate_size=32, is_decoder=True)
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(
                **common, **parts, decoder_start_token_id=2, forced_eos_token_id=None,
                max_position_embeddings=32,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                **common, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
                decoder_start_token_id=0,
            )
        ),
    }  # fmt: skip
    return made[name]().eval()


@pytest.mark.parametrize("name", ["gpt2", "mistral", "qwen2", "bert", "bart", "t5"])
def test_a_pattern_for_all_knows_a_cache(name):
    """Of a decoder's own keys: it counts from the last, and generates as without the cache."""
    model, ids = decoder(name), batch("bert")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    report = swap(model, patterns=Toeplitz(2))
    assert any("; pattern" in what for what in report.changed.values())
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, **options, use_cache=False))


def test_a_pattern_for_all_is_not_for_keys_of_another_kind():
    """Segformer's keys are fewer than its queries; SigLIP's head asks with one of its own."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pooled = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**small, intermediate_size=16, image_size=16, patch_size=4)
    )
    reduced = transformers.SegformerModel(
        transformers.SegformerConfig(
            num_encoder_blocks=1,
            depths=[1],
            sr_ratios=[4],
            hidden_sizes=[16],
            patch_sizes=[3],
            strides=[2],
            num_attention_heads=[2],
            mlp_ratios=[1],
        )
    )
    for model, name in ((pooled, "head.attention"), (reduced, "blocks.0.attention")):
        image = {"pixel_values": torch.randn(1, 3, 16, 16)}
        with (
            swap(model, patterns=Toeplitz(1)),
            pytest.raises(ValueError, match=f"{name} was called with .* cross-attention"),
        ):
            model(**image)
        with swap(model, patterns={f"*{name}": None, "*": Toeplitz(1)}):
            model(**image)


def test_a_pattern_counts_from_the_end_in_a_cache():
    """A neighbourhood moves with the newest token; blocks count from the first and cannot."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = build("llama", "sdpa").eval()
    ids = batch("llama")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    with swap(model, patterns=Toeplitz(2)):
        cached = model.generate(input_ids=ids, **options)
        assert torch.equal(cached, model.generate(input_ids=ids, **options, use_cache=False))
    with (
        swap(model, patterns=BlockDiagonal(4)),
        pytest.raises(ValueError, match="BlockDiagonal counts from the first position"),
    ):
        model.generate(input_ids=ids, **options)
    with (
        swap(model, patterns=Toeplitz(2)),
        pytest.raises(ValueError, match="a static cache has places that are not used yet"),
    ):
        model.generate(input_ids=ids, **options, cache_implementation="static")
