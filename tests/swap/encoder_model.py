"""A small model of torch's own transformer layers."""

import torch
from torch import nn


class Model(nn.Module):
    """Two encoder layers and a projection."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding))


NAMES = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


def inputs():
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return {"x": torch.randn(2, 6, 16), "padding": padding}
