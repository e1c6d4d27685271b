"""Tiny random-weights models of transformers with a padded batch each; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IMAGE = {"image_size": 16, "patch_size": 4}


@dataclass(frozen=True)
class Tiny:
    """One model: how many attention modules it has, and what LoRA can be put on."""

    modules: int
    lora: tuple[str, ...]
    tokens: int = 0  # of a self-attention module, where a learned mask is tested


TINY = {
    "llama": Tiny(2, ("q_proj", "v_proj"), 9),
    "bert": Tiny(2, ("query", "value"), 9),
    "vit": Tiny(2, ("q_proj", "v_proj"), 17),
    "clip": Tiny(4, ("q_proj", "v_proj"), 17),
    "swin": Tiny(4, ("q_proj", "v_proj"), 16),
    "swinv2": Tiny(4, ("query", "value"), 16),
    "clap": Tiny(4, ("query", "value"), 16),
    "t5": Tiny(6, ("q", "v"), 9),
    "videomae": Tiny(2, ("query", "value"), 32),
    "ast": Tiny(2, ("q_proj", "v_proj"), 38),
    "detr": Tiny(3, ("q_proj", "v_proj")),
    "whisper": Tiny(2, ("q_proj", "v_proj"), 20),
    "gpt2": Tiny(2, ("c_attn",), 9),
    "distilbert": Tiny(2, ("q_lin", "v_lin"), 9),
    "modernbert": Tiny(2, ("Wqkv",), 9),
    "deepseek": Tiny(2, ("q_b_proj", "kv_b_proj"), 9),
}


def build(name: str, attention: str | None = "eager"):
    """The model, the same weights every time; attention is transformers' attn_implementation."""
    import transformers as t
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    t.logging.set_verbosity_error()
    text = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    build_one = {
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**text, **_SMALL, num_key_value_heads=2, max_position_embeddings=32)
        ),
        "bert": lambda: t.BertModel(t.BertConfig(vocab_size=50, **_SMALL, **_NO_DROPOUT)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**_IMAGE, **_SMALL)),
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**text, **_SMALL, "max_position_embeddings": 16},
                vision_config={**_IMAGE, **_SMALL},
                projection_dim=16,
            )
        ),
        "swin": lambda: t.SwinModel(
            t.SwinConfig(
                image_size=32,
                patch_size=2,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                drop_path_rate=0.0,
            )
        ),
        "swinv2": lambda: t.Swinv2Model(
            t.Swinv2Config(
                image_size=32,
                patch_size=2,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                drop_path_rate=0.0,
            )
        ),
        "clap": lambda: t.ClapAudioModel(
            t.ClapAudioConfig(
                window_size=4,
                num_mel_bins=16,
                spec_size=64,
                hidden_size=32,
                patch_size=4,
                patch_stride=[4, 4],
                num_classes=4,
                depths=[2, 2],
                num_attention_heads=[2, 4],
                patch_embeds_hidden_size=16,
                num_hidden_layers=2,
                enable_fusion=False,
                drop_path_rate=0.0,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ),
        "t5": lambda: t.T5Model(
            t.T5Config(
                vocab_size=50,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        ),
        "videomae": lambda: t.VideoMAEModel(t.VideoMAEConfig(**_IMAGE, num_frames=4, **_SMALL)),
        "ast": lambda: t.ASTModel(
            t.ASTConfig(
                num_mel_bins=16,
                max_length=40,
                patch_size=8,
                frequency_stride=4,
                time_stride=4,
                **_SMALL,
            )
        ),
        "detr": lambda: t.DetrModel(
            t.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                num_queries=5,
                backbone_config=t.ResNetConfig(
                    embedding_size=8,
                    hidden_sizes=[8, 16],
                    depths=[1, 1],
                    layer_type="basic",
                    out_features=["stage2"],
                ),
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                dropout=0.0,
            )
        ),
        "whisper": lambda: WhisperEncoder(
            t.WhisperConfig(
                d_model=32,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=20,
                dropout=0.0,
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                **text,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(
                vocab_size=50,
                dim=32,
                n_layers=2,
                n_heads=4,
                hidden_dim=48,
                dropout=0.0,
                attention_dropout=0.0,
            )
        ),
        "modernbert": lambda: t.ModernBertModel(
            t.ModernBertConfig(**text, **_SMALL, local_attention=8, global_attn_every_n_layers=2)
        ),
        "deepseek": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **text,
                **_SMALL,
                num_key_value_heads=4,
                first_k_dense_replace=2,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
            )
        ),
    }[name]
    torch.manual_seed(0)
    model = build_one()
    for parameter in model.parameters():  # wide enough that attention is not uniform
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if attention and name not in ("swinv2", "clap"):
        model.set_attn_implementation(attention)
    return model.train()


def batch(name: str) -> dict[str, torch.Tensor]:
    """Two samples; padded where the model knows padding (Llama on the left, the others right)."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 9))
    right = torch.ones(2, 9, dtype=torch.long)
    right[1, 6:] = 0
    left = right.flip(1)
    image = torch.randn(2, 3, 16, 16)
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    return {
        "llama": {"input_ids": ids, "attention_mask": left, "use_cache": False},
        "bert": {"input_ids": ids, "attention_mask": right},
        "vit": {"pixel_values": image},
        "clip": {"input_ids": ids, "attention_mask": right, "pixel_values": image},
        "swin": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "swinv2": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "clap": {"input_features": torch.randn(2, 1, 256, 16)},
        "t5": {
            "input_ids": ids, "attention_mask": right, "decoder_input_ids": ids[:, :5],
            "use_cache": False,
        },
        "videomae": {"pixel_values": torch.randn(2, 4, 3, 16, 16)},
        "ast": {"input_values": torch.randn(2, 40, 16)},
        "detr": {"pixel_values": torch.randn(2, 3, 64, 64), "pixel_mask": mask},
        "whisper": {"input_features": torch.randn(2, 8, 40)},
        "gpt2": {"input_ids": ids, "attention_mask": right, "use_cache": False},
        "distilbert": {"input_ids": ids, "attention_mask": right},
        "modernbert": {"input_ids": ids, "attention_mask": right},
        "deepseek": {"input_ids": ids, "attention_mask": right, "use_cache": False},
    }[name]  # fmt: skip
