"""Swapped digits: a transformer of torch.nn, as people already have one, with a learned mask
swapped in; in one process, or under torchrun with DDP or FSDP2.

    python -m lam_kernels train swapped-digits
    torchrun --nproc-per-node 2 -m lam_kernels train swapped-digits --parallel fsdp

The losses are those of one process within rounding, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lam_kernels.data import load_digits
from lam_kernels.swap import LearnedMask, swap
from lam_kernels.training.atomic_write import atomic_write, check_writable
from lam_kernels.training.distributed import PARALLEL, Ranks
from lam_kernels.training.loop import LoopOptions, fit, make_optimizer, new_history
from lam_kernels.user_error import UserError

SUMMARY = "real digits with a torch.nn transformer that was swapped; also under torchrun"
TOKENS, PIXELS = 16, 4  # patches of 2 x 2


class DigitsTransformer(nn.Module):
    """Nothing of lam_kernels in it: images [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4):
        super().__init__()
        self.patch = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(torch.randn(TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)  # [B, 16, 4]
        return self.head(self.encoder(self.patch(patches) + self.position).mean(1))


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = __doc__.partition("\n\n")[2]
    parser.add_argument("--parallel", choices=PARALLEL, default="ddp", help="under torchrun")
    parser.add_argument("--epochs", type=int, default=6, metavar="N", help="default: 6")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--lr", type=float, default=5e-3, metavar="X", help="default: 0.005")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--backend", help="of the op (default: the first that serves the device)")
    parser.add_argument("--no-swap", action="store_true", help="the untouched model, to compare")
    parser.add_argument("--out", metavar="FILE", help="where the losses go as JSON")


def train(args: argparse.Namespace) -> int:
    try:
        options = LoopOptions(
            epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.out:
        check_writable(Path(args.out))
    train_set, test_set = load_digits(args.seed)
    ranks = Ranks()
    torch.manual_seed(args.seed)  # the same weights in every process
    model = DigitsTransformer()
    if not args.no_swap:
        report = swap(model, learned_mask=LearnedMask(TOKENS), backend=args.backend, strict=True)
        if ranks.first:
            print(report)
    trained = ranks.wrap(model, args.parallel, model.encoder.layers)  # after the swap
    optimizer = make_optimizer(model, options)  # after that
    history = new_history()

    def loss_of(indices: Tensor) -> tuple[Tensor, int]:
        images, labels = train_set.batch(indices)
        return F.cross_entropy(trained(images), labels), len(labels)

    def after_epoch(epoch: int) -> str:
        images, labels = test_set.batch(torch.arange(len(test_set)))
        model.eval()
        with torch.no_grad():  # every process: an FSDP model gathers its weights in all of them
            right = (trained(images).argmax(1) == labels).double().mean().item()
        history["accuracy"].append(right)
        return f"loss {history['loss'][-1]:.3f}, test accuracy {right:.1%}"

    fit(
        model, optimizer, options, count=len(train_set), loss_of=loss_of, history=history,
        first_epoch=0, label="swapped-digits", device="cpu", after_epoch=after_epoch, ranks=ranks,
    )  # fmt: skip
    ranks.close()
    if ranks.first:
        how = f"{ranks.world} processes, {args.parallel}" if ranks.world > 1 else "1 process"
        print(f"{how}: last loss {history['loss'][-1]:.6f}, accuracy {history['accuracy'][-1]:.1%}")
        if args.out:
            atomic_write(Path(args.out), json.dumps(history))
    return 0
