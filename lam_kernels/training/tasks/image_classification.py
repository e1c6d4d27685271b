"""Image classification: a small vision transformer with a learned mask in every layer, beside one
    without.

Three variants from the same seed and, with the identity start, the same first loss: "plain"
(PyTorch's SDPA), "lam-reference" (learned mask, plain PyTorch) and "lam-fused" (learned mask, our
kernels). Without --variant each runs in a process of its own, so that none of them measures
another's memory, and a table and pictures compare them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from lam_kernels.data import LabelledImages, load_digits, load_image_folder
from lam_kernels.models.image_classifier import ImageClassifier, ImageClassifierConfig
from lam_kernels.optional_package import optional_package
from lam_kernels.training import pictures
from lam_kernels.training.atomic_write import atomic_write, check_writable
from lam_kernels.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lam_kernels.training.comparison import gains, results_table, run_process
from lam_kernels.training.distributed import Ranks, refuse_torchrun
from lam_kernels.training.interruption import EXIT_CODE, further_interrupts_ignored
from lam_kernels.training.loop import (
    MAX_SEED,
    LoopOptions,
    fit,
    make_optimizer,
    new_history,
    read_history,
    seconds_per_step,
)
from lam_kernels.training.machine import add_machine_arguments, apply_machine, check_backend
from lam_kernels.training.peak_memory import PeakMemory
from lam_kernels.user_error import UserError

SUMMARY = (
    "a small vision transformer with a learned attention mask (default data: 1,797 real digits)"
)
TASK = "image-classification"
VARIANTS = ("plain", "lam-reference", "lam-fused")
CHECKPOINT, RESULT = "checkpoint.safetensors", "result.json"

_EPILOG = """\
examples:
  %(prog)s
      the demo: three variants, a table, pictures under out/image-classification
  %(prog)s --data photos --image-size 64 --patch-size 8 --channels 3 --variant lam-fused --epochs 30
      your images: photos/<class>/*.jpg (20 %% of each class become the test set), or photos/train
          and photos/val
  %(prog)s --resume out/image-classification/lam-fused/checkpoint.safetensors
      goes on after Ctrl-C; the losses are those of a run that was never interrupted
  torchrun --nproc-per-node 2 -m lam_kernels train image-classification --variant lam-fused
      two processes that share every batch (DDP): the losses are those of one within rounding
"""

# what the demo trains: 12 epochs of 6 steps reach about 96 %, in about half a minute a variant
_DEFAULTS = {
    "data": None,
    "variant": None,
    "backend": None,
    "epochs": 12,
    "batch_size": 256,
    "lr": 6e-3,
    "weight_decay": 0.05,
    "dtype": "fp32",
    "seed": 0,
    "image_size": 8,
    "patch_size": 1,
    "channels": 1,
    "width": 64,
    "depth": 3,
    "heads": 8,
    "scope": "layer",
    "fusion": "mul",
    "mask_depth": 1,
    "mask_heads": 1,
    "mask_init": "identity",
    "mask_activation": None,
    "dropout": 0.0,
}
_MODEL_OPTIONS = tuple(_DEFAULTS)[list(_DEFAULTS).index("image_size") :]


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.set_defaults(prog=parser.prog)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--variant",
        choices=VARIANTS,
        help="train this one only (default: all three, one after the other)",
    )
    run.add_argument(
        "--data",
        metavar="FOLDER",
        help="images: one sub-folder a class, or train/ and val/ of that (default: the digits)",
    )
    run.add_argument(
        "--out",
        metavar="FOLDER",
        help=f"where checkpoints, table and pictures go (default: out/{TASK})",
    )
    run.add_argument("--resume", metavar="FILE", help="go on from this checkpoint")
    run.add_argument(
        "--epochs", type=int, metavar="N", help=_help("passes over the data", "epochs")
    )
    run.add_argument(
        "--batch-size", type=int, metavar="N", help=_help("images a step", "batch_size")
    )
    run.add_argument("--lr", type=float, metavar="X", help=_help("highest learning rate", "lr"))
    run.add_argument(
        "--weight-decay", type=float, metavar="X", help=_help("of matrices", "weight_decay")
    )
    run.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help=_help("bf16 is autocast; weights stay fp32", "dtype"),
    )
    run.add_argument("--seed", type=int, metavar="N", help=_help("weights, order, split", "seed"))
    run.add_argument(
        "--backend", help="of the fused variant (default: the first that serves the device)"
    )
    run.add_argument("--no-pictures", action="store_true", help="draw nothing")
    # one of the three processes of a comparison: the table and the pictures come from the parent
    run.add_argument("--in-comparison", action="store_true", help=argparse.SUPPRESS)
    add_machine_arguments(run)
    model = parser.add_argument_group("model")
    for name, text in (
        ("image-size", "images become squares of this side"),
        ("patch-size", "side of one token"),
        ("channels", "1 (grey) or 3 (RGB), for --data"),
        ("width", "of a token"),
        ("depth", "transformer layers"),
        ("heads", "attention heads"),
        ("mask-depth", "linear layers of each mask generator, 1 to 64"),
        ("mask-heads", "1 (one mask for all heads) or the number of heads"),
    ):
        model.add_argument(
            f"--{name}", type=int, metavar="N", help=_help(text, name.replace("-", "_"))
        )
    for name, choices, text in (
        ("scope", ("layer", "global"), "a mask for each layer, or one for all"),
        ("fusion", ("mul", "add", "gate"), "scores * M, scores + M, or weights * M"),
        ("mask-init", ("identity", "paper"), "start as plain attention, or as the library does"),
        ("mask-activation", ("relu", "softplus", "sigmoid", "tanh"), "of the mask; gate needs one"),
    ):
        model.add_argument(f"--{name}", choices=choices, help=_help(text, name.replace("-", "_")))
    model.add_argument("--dropout", type=float, metavar="P", help=_help("in training", "dropout"))


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="written by train")
    parser.add_argument(
        "--data", metavar="FOLDER", help="images to measure on (default: what it was trained on)"
    )
    parser.add_argument("--backend", help="of the op (default: as in training)")
    add_machine_arguments(parser)


def _help(text: str, option: str) -> str:
    default = _DEFAULTS[option]
    return text if default is None else f"{text} (default: {default})"


# ---- one variant --------------------------------------------------------------------------------
# ------------------


@dataclass
class _Run:
    """What one variant needs; everything is checked before the first file is written."""

    variant: str
    backend: str | None
    source: str | None  # folder of images, None: the digits
    split_seed: int
    model: ImageClassifierConfig
    loop: LoopOptions
    train: LabelledImages
    test: LabelledImages

    @property
    def op_backend(self) -> str | None:
        return "reference" if self.variant == "lam-reference" else self.backend

    def config(self) -> dict:
        return {
            "variant": self.variant,
            "backend": self.backend,
            "source": self.source,
            "split_seed": self.split_seed,
            "classes": list(self.train.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "model": dataclasses.asdict(self.model),
            "loop": dataclasses.asdict(self.loop),
        }


def train(args: argparse.Namespace) -> int:
    if not args.no_pictures:
        pictures.require_matplotlib()
    optional_package("safetensors.torch", "writing a checkpoint")
    apply_machine(args)
    if args.variant is None and args.resume is None:
        refuse_torchrun("give --variant: the comparison starts processes of its own")
        return _train_all(args)
    checkpoint = load_checkpoint(args.resume, TASK) if args.resume else None
    if checkpoint:
        run = _run_of_checkpoint(checkpoint, args)
        folder = Path(args.out) / run.variant if args.out else checkpoint.path.parent
    else:
        run = _run_of_options(args)
        folder = Path(args.out or f"out/{TASK}") / run.variant
    _check_backend(run.variant, run.op_backend, args.device)
    return _train_one(run, folder, checkpoint, args)


def _train_one(
    run: _Run, folder: Path, checkpoint: Checkpoint | None, args: argparse.Namespace
) -> int:
    torch.manual_seed(run.loop.seed)
    model = ImageClassifier(run.model, backend=run.op_backend)
    torch.manual_seed(run.loop.seed)
    model.reset_parameters()  # plain and LAM start from the same weights
    model.to(args.device)
    ranks = Ranks(args.device)
    optimizer = make_optimizer(model, run.loop)
    history, first_epoch = new_history(), 0
    if checkpoint:
        checkpoint.into(model)
        checkpoint.into_optimizer(optimizer, model)
        checkpoint.into_rng()
        history = read_history(checkpoint)
        first_epoch = checkpoint.epoch
    path = folder / CHECKPOINT
    check_writable(path)
    saved, saved_epoch = (checkpoint.path if checkpoint else None), first_epoch

    trained = ranks.wrap(model)

    def loss_of(indices):
        images, labels = run.train.batch(indices)
        loss = F.cross_entropy(trained(images.to(args.device)), labels.to(args.device))
        return loss, len(labels)

    def after_epoch(epoch: int) -> str:
        nonlocal saved, saved_epoch
        history["accuracy"].append(_accuracy(model, run.test, run.loop, args.device))
        if ranks.first:
            save_checkpoint(
                path,
                task=TASK,
                epoch=epoch,
                config=run.config(),
                history=history,
                model=model,
                optimizer=optimizer,
            )
        saved, saved_epoch = path, epoch
        return f"loss {history['loss'][-1]:.3f}, test accuracy {history['accuracy'][-1]:.1%}"

    memory = PeakMemory(args.device)
    try:
        fit(
            model,
            optimizer,
            run.loop,
            count=len(run.train),
            loss_of=loss_of,
            history=history,
            first_epoch=first_epoch,
            label=f"{run.variant:<13}",
            device=args.device,
            after_epoch=after_epoch,
            ranks=ranks,
        )
    except KeyboardInterrupt:
        with further_interrupts_ignored():
            if saved is None:
                sentence = "before the first epoch was complete, so there is no checkpoint"
            else:
                command = f"{args.prog} --resume {shlex.quote(str(saved))}"
                sentence = (
                    f"the last complete checkpoint is {saved} (epoch {saved_epoch}); "
                    f"resume with: {command}"
                )
            print(f"\nlam_kernels: interrupted: {sentence}", file=sys.stderr, flush=True)
        return EXIT_CODE
    ranks.close()
    if not ranks.first:
        return 0
    result = {
        "variant": run.variant,
        "accuracy": history["accuracy"][-1],
        "seconds_per_step": seconds_per_step(history),
        "peak_mib": memory.peak_mib,
        "above_start_mib": memory.above_start_mib,
        "threads": torch.get_num_threads(),
        "history": history,
    }
    atomic_write(folder / RESULT, json.dumps(result))
    if args.in_comparison:
        return 0
    if not args.no_pictures:
        _draw_one(folder, model, run, history)
    print(results_table([result]))
    print(f"checkpoint: {path}")
    return 0


def _run_of_options(args: argparse.Namespace) -> _Run:
    options = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in _DEFAULTS.items()
    }
    try:
        loop = LoopOptions(
            **{
                f.name: options[f.name]
                for f in dataclasses.fields(LoopOptions)
                if f.name in options
            }
        )
        settings = {name: options[name] for name in _MODEL_OPTIONS}
        settings["attention"] = "plain" if args.variant == "plain" else "lam"
        settings["feedforward"] = 2 * options["width"]
        # before any data is read; the number of classes comes with it
        ImageClassifierConfig(classes=1, **settings)
        _check_buildable(ImageClassifierConfig(classes=1, **settings))
    except ValueError as error:
        raise UserError(str(error)) from None
    train, test = _load_data(args.data, options["seed"], options["image_size"], options["channels"])
    return _Run(
        args.variant,
        args.backend,
        args.data,
        options["seed"],
        ImageClassifierConfig(classes=len(train.classes), **settings),
        loop,
        train,
        test,
    )


def _run_of_checkpoint(checkpoint: Checkpoint, args: argparse.Namespace) -> _Run:
    config = checkpoint.config
    fixed = [
        name
        for name in _DEFAULTS
        if name not in ("data", "epochs", "backend") and getattr(args, name, None) is not None
    ]
    if fixed:
        option = "--" + fixed[0].replace("_", "-")
        raise UserError(f"{option} cannot be given with --resume: the checkpoint decides it")
    variant, model, loop = _check_config(checkpoint)
    if args.epochs is not None:
        loop = dataclasses.replace(loop, epochs=args.epochs)
    if checkpoint.epoch >= loop.epochs:
        raise UserError(
            f"{checkpoint.path}: epoch {checkpoint.epoch} of {loop.epochs} is done already: "
            "give a larger --epochs to go on"
        )
    train, test = _load_data_of(checkpoint, model, args.data)
    counts = (config.get("train_images"), config.get("test_images"))
    if counts != (len(train), len(test)):
        raise UserError(
            f"{checkpoint.path}: it was trained on {counts[0]} and tested on {counts[1]} images, "
            f"but the data now has {len(train)} and {len(test)}"
        )
    backend = args.backend or config.get("backend")
    return _Run(
        variant,
        backend,
        args.data or config.get("source"),
        config["split_seed"],
        model,
        loop,
        train,
        test,
    )


def _check_config(checkpoint: Checkpoint) -> tuple[str, ImageClassifierConfig, LoopOptions]:
    """The typed parts of the configuration; checks that its tensors fit the model before memory is
    spent on one.
    """
    config, path = checkpoint.config, checkpoint.path
    variant = config.get("variant")
    if variant not in VARIANTS:
        raise UserError(
            f"{path}: the record config.variant is {variant!r}, expected one of {list(VARIANTS)}"
        )
    for record, types in (
        ("backend", (str, type(None))),
        ("source", (str, type(None))),
        ("split_seed", (int,)),
    ):
        if type(config.get(record)) not in types:
            raise UserError(f"{path}: the record config.{record} is {config.get(record)!r}")
    if not 0 <= config["split_seed"] <= MAX_SEED:
        raise UserError(f"{path}: the record config.split_seed is {config['split_seed']}")
    classes = config.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: the record config.classes is not a list of names")
    parts = []
    for record, kind in (("model", ImageClassifierConfig), ("loop", LoopOptions)):
        try:
            parts.append(kind(**config.get(record)))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: the record config.{record} is not valid ({error})") from None
    model, loop = parts
    if model.classes != len(classes):
        raise UserError(
            f"{path}: the model has {model.classes} classes, but {len(classes)} are named"
        )
    if (variant == "plain") != (model.attention == "plain"):
        raise UserError(
            f"{path}: the variant {variant} does not go with attention {model.attention!r}"
        )
    try:
        skeleton = ImageClassifier(model, device="meta")
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: the record config.model is not valid ({error})") from None
    checkpoint.check_model(skeleton.state_dict())
    return variant, model, loop


def _check_buildable(config: ImageClassifierConfig) -> None:
    """Raises what the modules raise, without memory for the weights."""
    ImageClassifier(config, device="meta")


def _load_data(
    source: str | None, split_seed: int, image_size: int, channels: int
) -> tuple[LabelledImages, LabelledImages]:
    if source is not None:
        return load_image_folder(source, image_size, channels, split_seed=split_seed)
    if (image_size, channels) != (8, 1):
        raise UserError(
            "the digits are 8 x 8 grey images: --image-size and --channels go with --data"
        )
    return load_digits(split_seed)


def _load_data_of(checkpoint: Checkpoint, model: ImageClassifierConfig, data: str | None):
    source = data or checkpoint.config.get("source")
    train, test = _load_data(
        source, checkpoint.config["split_seed"], model.image_size, model.channels
    )
    if list(train.classes) != checkpoint.config["classes"]:
        raise UserError(
            f"{source or 'the digits'}: its classes are not those of {checkpoint.path}: "
            f"{_shorten(train.classes)} and {_shorten(checkpoint.config['classes'])}"
        )
    return train, test


def _shorten(names) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _check_backend(variant: str, backend: str | None, device: str) -> None:
    if variant != "plain":
        check_backend(backend, device)


@torch.no_grad()
def _accuracy(
    model: ImageClassifier, test: LabelledImages, loop: LoopOptions, device: str
) -> float:
    """Share of test images whose highest logit is their class."""
    was_training = model.training
    model.eval()
    right = 0
    for indices in torch.arange(len(test)).split(loop.batch_size):
        images, labels = test.batch(indices)
        with loop.autocast(device):
            logits = model(images.to(device))
        right += int((logits.argmax(dim=1).cpu() == labels).sum())
    model.train(was_training)
    return right / len(test)


def evaluate(args: argparse.Namespace) -> int:
    apply_machine(args)
    checkpoint = load_checkpoint(args.checkpoint, TASK)
    model, run_backend, loop = _model_of(checkpoint, args.backend)
    _check_backend(checkpoint.config["variant"], run_backend, args.device)
    _, test = _load_data_of(checkpoint, model.config, args.data)
    accuracy = _accuracy(model.to(args.device), test, loop, args.device)
    recorded = read_history(checkpoint)["accuracy"]
    variant = checkpoint.config["variant"]
    print(f"{checkpoint.path}: {variant}, epoch {checkpoint.epoch} of {loop.epochs}")
    print(f"test accuracy {accuracy:.4f} ({round(accuracy * len(test))} of {len(test)} images)")
    if recorded and args.data is None:
        print(f"recorded in training: {recorded[-1]:.4f}")
    return 0


def _model_of(
    checkpoint: Checkpoint, backend: str | None = None
) -> tuple[ImageClassifier, str | None, LoopOptions]:
    variant, config, loop = _check_config(checkpoint)
    recorded = "reference" if variant == "lam-reference" else checkpoint.config["backend"]
    backend = backend or recorded
    model = ImageClassifier(config, backend=backend)
    checkpoint.into(model)
    return model.eval(), backend, loop


# ---- the three beside each other
# ----------------------------------------------------------------------------------


def _train_all(args: argparse.Namespace) -> int:
    _check_backend("lam-fused", args.backend, args.device)
    out = Path(args.out or f"out/{TASK}")
    print(f"{TASK}: {', '.join(VARIANTS)}, one process each; results go to {out}", flush=True)
    for variant in VARIANTS:
        code = run_process(TASK, [*args.argv, "--variant", variant, "--in-comparison"])
        if code:
            return code
    results = [json.loads((out / variant / RESULT).read_text()) for variant in VARIANTS]
    text = results_table(results) + "\n\n" + gains(results)
    print("\n" + text)
    atomic_write(out / "results.md", text + "\n")
    if not args.no_pictures:
        print("pictures: " + ", ".join(str(path) for path in _draw_all(out, results)))
    return 0


def _draw_one(folder: Path, model: ImageClassifier, run: _Run, history: dict) -> None:
    pictures.draw_loss_curves(folder / "loss_curves.png", {run.variant: history})
    if run.variant == "plain":
        return
    images, names = _examples(run.test)
    _, masks = pictures.attention_maps(
        model, run.test.batch(_first(run.test, 64))[0].to(_device(model))
    )
    pictures.draw_masks(folder / "learned_masks.png", masks, identity=_identity(run.model))
    on, _ = pictures.attention_maps(model, images.to(_device(model)))
    off, _ = pictures.attention_maps(model, images.to(_device(model)), masked=False)
    pictures.draw_attention(folder / "attention.png", images, names, off, on, run.model.grid)


def _draw_all(out: Path, results: list[dict]) -> list[Path]:
    """Loss curves of all three; masks of the fused variant; attention of the plain model beside
    the fused one's.
    """
    paths = [out / name for name in ("loss_curves.png", "learned_masks.png", "attention.png")]
    pictures.draw_loss_curves(paths[0], {r["variant"]: r["history"] for r in results})
    checkpoints = [
        load_checkpoint(out / name / CHECKPOINT, TASK) for name in ("plain", "lam-fused")
    ]
    plain, fused = (_model_of(checkpoint)[0] for checkpoint in checkpoints)
    _, test = _load_data_of(checkpoints[1], fused.config, None)
    _, masks = pictures.attention_maps(fused, test.batch(_first(test, 64))[0])
    pictures.draw_masks(paths[1], masks, identity=_identity(fused.config))
    images, names = _examples(test)
    without, _ = pictures.attention_maps(plain, images)
    with_mask, _ = pictures.attention_maps(fused, images)
    pictures.draw_attention(paths[2], images, names, without, with_mask, fused.config.grid)
    return paths


def _examples(test: LabelledImages, count: int = 4):
    """The first test image of a few classes."""
    chosen = [int(torch.nonzero(test.labels == label)[0]) for label in test.labels.unique()[:count]]
    images, labels = test.batch(torch.tensor(chosen))
    return images, [test.classes[label] for label in labels.tolist()]


def _first(test: LabelledImages, count: int) -> torch.Tensor:
    return torch.arange(min(count, len(test)))


def _identity(config: ImageClassifierConfig) -> float:
    return 0.0 if config.fusion == "add" else 1.0


def _device(model: ImageClassifier) -> torch.device:
    return model.position.device
