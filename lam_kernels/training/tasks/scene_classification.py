"""Scene classification: multi-label tags of clips of frame features, with global attention beside
    global and local.

Four variants from the same seed: "global" (plain attention, the baseline), "share", "gate_map" and
"gate_output" (GMSA's ShareAtt, GateAtt and GateOp). Without --variant each runs in a process of its
own and a table compares them. Without --data the clips are real sequences that installed packages
carry, written as TFRecord shards first.
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
from torch import Tensor

from lam_kernels.models.scene_classifier import (
    PATTERNS,
    VARIANTS,
    SceneClassifier,
    SceneClassifierConfig,
)
from lam_kernels.optional_package import optional_package
from lam_kernels.training import pictures
from lam_kernels.training.atomic_write import atomic_write, check_writable
from lam_kernels.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lam_kernels.training.comparison import run_process
from lam_kernels.training.distributed import Ranks, refuse_torchrun
from lam_kernels.training.interruption import EXIT_CODE, further_interrupts_ignored
from lam_kernels.training.label_metrics import LabelMeter, LabelMetrics
from lam_kernels.training.loop import (
    LoopOptions,
    fit,
    make_optimizer,
    new_history,
    read_history,
    seconds_per_step,
)
from lam_kernels.training.machine import add_machine_arguments, apply_machine, check_backend
from lam_kernels.training.sensitivity import NORMS, sensitivity
from lam_kernels.training.text_table import text_table
from lam_kernels.user_error import UserError

SUMMARY = "tags of video clips by global and local attention over frame features (YouTube-8M form)"
TASK = "scene-classification"
CHECKPOINT, RESULT = "checkpoint.safetensors", "result.json"

_EPILOG = """\
examples:
  %(prog)s
      the demo: four variants on real sequences, a table and pictures under out/scene-classification
  %(prog)s --data 'yt8m/train*.tfrecord' --eval-data 'yt8m/validate*.tfrecord' --variant gate_output
      YouTube-8M frame-level shards (or a folder of .npz with rgb, audio and labels)
  torchrun --nproc-per-node 2 -m lam_kernels train scene-classification --data ... --variant share
      two processes, one model
"""

_MODEL = {
    "classes": 3862, "visual_width": 1024, "audio_width": 128, "heads": 8, "max_len": 300,
    "pattern": "toeplitz", "block": 20, "radius": 15, "dilation": 4,
}  # fmt: skip
_LOOP = {"epochs": 5, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.0, "dtype": "fp32", "seed": 0}
# what the demo trains where the options leave it open
_DEMO = {
    "classes": 14, "visual_width": 256, "audio_width": 16, "max_len": 100, "radius": 5, "block": 10,
    "epochs": 10, "batch_size": 24, "lr": 3e-3,
}  # fmt: skip


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.set_defaults(prog=parser.prog)
    run = parser.add_argument_group("run")
    run.add_argument("--variant", choices=VARIANTS, help="this one only (default: all four)")
    run.add_argument("--data", metavar="GLOB", help="TFRecord shards, or a folder of .npz")
    run.add_argument(
        "--eval-data",
        metavar="GLOB",
        help="default: the checkpoint's with --resume, or a fifth of --data, by the seed",
    )
    run.add_argument(
        "--corrupt",
        choices=("skip", "stop"),
        default="skip",
        help="what a corrupt record does (default: skip, counted at the end)",
    )
    run.add_argument("--out", metavar="FOLDER", help=f"default: out/{TASK}")
    run.add_argument("--resume", metavar="FILE", help="go on from this checkpoint")
    for name, kind, text in (
        ("epochs", int, "passes over the data"), ("batch-size", int, "clips a step"),
        ("lr", float, "highest learning rate"), ("weight-decay", float, "of matrices"),
        ("seed", int, "weights, order, split"),
    ):  # fmt: skip
        run.add_argument(f"--{name}", type=kind, metavar="N", help=_help(text, name))
    run.add_argument("--dtype", choices=("fp32", "bf16"), help=_help("bf16 is autocast", "dtype"))
    run.add_argument("--backend", help="of the ops (default: the first that serves the device)")
    run.add_argument("--no-pictures", action="store_true", help="draw nothing")
    run.add_argument("--in-comparison", action="store_true", help=argparse.SUPPRESS)
    add_machine_arguments(run)
    model = parser.add_argument_group("model")
    model.add_argument("--pattern", choices=PATTERNS, help=_help("of the local half", "pattern"))
    for name, text in (
        ("classes", "labels are 0 .. N - 1"), ("visual-width", "bytes of a frame's rgb"),
        ("audio-width", "bytes of a frame's audio"), ("heads", "attention heads"),
        ("max-len", "frames, the rest of a clip is cut"), ("block", "of the pattern block"),
        ("radius", "of toeplitz and dilated"), ("dilation", "of dilated"),
    ):  # fmt: skip
        model.add_argument(f"--{name}", type=int, metavar="N", help=_help(text, name))


def _help(text: str, option: str) -> str:
    name = option.replace("-", "_")
    usual, demo = {**_MODEL, **_LOOP}[name], _DEMO.get(name)
    return f"{text} (default: {usual}" + (f", demo: {demo})" if demo is not None else ")")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="written by train")
    parser.add_argument("--data", metavar="GLOB", help="default: what it was tested on in training")
    parser.add_argument("--corrupt", choices=("skip", "stop"), default="skip")
    parser.add_argument("--backend", help="of the ops (default: as in training)")
    add_machine_arguments(parser)


def add_analyse_arguments(parser: argparse.ArgumentParser) -> None:
    add_evaluate_arguments(parser)
    parser.add_argument("--clip", type=int, default=0, metavar="N", help="which one (default: 0)")
    parser.add_argument("--norm", choices=NORMS, default="hutchinson",
                        help="of a frame's gradient (default: hutchinson)")  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", help="the picture (default: beside the checkpoint)"
    )


# ---- one variant


@dataclass
class _Run:
    variant: str
    backend: str | None
    data: str
    eval_data: str | None
    fatal: bool
    model: SceneClassifierConfig
    loop: LoopOptions
    train: object = None  # Clips
    test: object = None

    def config(self) -> dict:
        return {
            "variant": self.variant, "backend": self.backend, "data": self.data,
            "eval_data": self.eval_data, "model": dataclasses.asdict(self.model),
            "loop": dataclasses.asdict(self.loop), "train_clips": len(self.train),
            "test_clips": len(self.test),
        }  # fmt: skip

    def load(self, quiet: bool = False) -> None:
        """Finds the clips; without data of its own the test is a fifth of all."""
        self.train = _find(self.data, self.model, self.fatal, quiet)
        if self.eval_data is not None:
            self.test = _find(self.eval_data, self.model, self.fatal, quiet)
            return
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(self.loop.seed)
        ).tolist()
        count = max(1, len(order) // 5)
        if count == len(order):
            raise UserError(f"{self.data}: {len(order)} clips are too few to train and to test")
        self.train, self.test = (
            self.train.subset(sorted(order[count:])), self.train.subset(sorted(order[:count])),
        )  # fmt: skip


def _find(pattern: str, model: SceneClassifierConfig, fatal: bool, quiet: bool = False):
    optional_package("numpy", "reading clips")
    from lam_kernels.data.youtube8m import find_clips

    return find_clips(
        pattern, model.visual_width, model.audio_width, model.classes, fatal=fatal, quiet=quiet
    )  # fmt: skip


def train(args: argparse.Namespace) -> int:
    if not args.no_pictures:
        pictures.require_matplotlib()
    optional_package("safetensors.torch", "writing a checkpoint")
    apply_machine(args)
    check_backend(args.backend, args.device)
    if args.eval_data is not None and args.data is None and args.resume is None:
        raise UserError("--eval-data needs --data: the demo's clips have a test of their own")
    out = Path(args.out or f"out/{TASK}")
    if args.variant is None and args.resume is None:
        return _train_all(args, out)
    ranks = Ranks(args.device)
    try:
        checkpoint = load_checkpoint(args.resume, TASK) if args.resume else None
        if checkpoint:
            run, folder = _run_of_checkpoint(checkpoint, args), checkpoint.path.parent
        else:
            run, folder = _run_of_options(args, out), out / args.variant
        return _train_one(run, folder, checkpoint, args, ranks)
    finally:
        ranks.close()


def _train_one(run: _Run, folder: Path, checkpoint: Checkpoint | None, args, ranks: Ranks) -> int:
    from lam_kernels.data.youtube8m import collate, empty_clip

    run.load(quiet=not ranks.first)
    if checkpoint:
        _refuse_changed_clips(run, checkpoint, args)
    torch.manual_seed(run.loop.seed)
    model = SceneClassifier(run.model, backend=run.backend)
    torch.manual_seed(run.loop.seed)
    model.reset_parameters()
    model.to(args.device)
    optimizer = make_optimizer(model, run.loop)
    history, first_epoch = new_history(), 0
    if checkpoint:
        checkpoint.into(model)
        checkpoint.into_optimizer(optimizer, model)
        checkpoint.into_rng()
        history, first_epoch = read_history(checkpoint), checkpoint.epoch
    path = folder / CHECKPOINT
    check_writable(path)
    wrapped = ranks.wrap(model)
    saved = checkpoint.path if checkpoint else None
    metrics: list[LabelMetrics] = []
    used = 0  # training clips that could be read, by this process

    def loss_of(indices):
        nonlocal used
        clips = run.train.clips(indices.tolist())
        count = len(clips)
        used += count
        if not clips:  # every record of the batch is corrupt: the step still has to be taken
            clips = [empty_clip(run.model.visual_width, run.model.audio_width)]
        visual, audio, frames, labels = (
            x.to(args.device) for x in collate(clips, run.model.classes, run.model.max_len)
        )
        logits = wrapped(visual, audio, frames).float()
        # summed over the classes, as in the data set's own code
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(clips)
        return loss, count

    def after_epoch(epoch: int) -> str:
        nonlocal saved
        if ranks.mean(float(used)) == 0:
            raise UserError(f"{run.data}: no training clip can be read")
        if ranks.first:
            metrics.append(_measure(model, run, args.device)[0])
            history["accuracy"].append(metrics[-1].gap)
            save_checkpoint(
                path, task=TASK, epoch=epoch, config=run.config(), history=history, model=model,
                optimizer=optimizer,
            )  # fmt: skip
            saved = path
        if not ranks.first:
            return ""
        return f"loss {history['loss'][-1]:.3f}, test GAP@20 {metrics[-1].gap:.4f}"

    try:
        fit(
            model, optimizer, run.loop, count=len(run.train), loss_of=loss_of, history=history,
            first_epoch=first_epoch, label=f"{run.variant:<11}", device=args.device,
            after_epoch=after_epoch, ranks=ranks,
        )  # fmt: skip
    except KeyboardInterrupt:
        with further_interrupts_ignored():
            sentence = "before the first epoch was complete, so there is no checkpoint"
            if saved is not None:
                command = f"{args.prog} --resume {shlex.quote(str(saved))}"
                sentence = f"the last complete checkpoint is {saved}; resume with: {command}"
            print(f"\nlam_kernels: interrupted: {sentence}", file=sys.stderr, flush=True)
        return EXIT_CODE
    # with a test of its own there are two accounts, each of all processes
    accounts = {id(clips.damage): clips.damage for clips in (run.train, run.test)}.values()
    for damage in accounts:
        ranks.gather(damage.seen)
    if not ranks.first:
        return 0
    parameters = sum(p.numel() for p in model.parameters())
    result = {
        "variant": run.variant, **dataclasses.asdict(metrics[-1]), "parameters": parameters,
        "seconds_per_step": seconds_per_step(history), "threads": torch.get_num_threads(),
        "history": history, "skipped": len({record for d in accounts for record in d.seen}),
    }  # fmt: skip
    atomic_write(folder / RESULT, json.dumps(result))
    for damage in accounts:
        if damage.seen:
            print(damage.summary())
    if not args.in_comparison:
        print(results_table([result]))
        print(f"checkpoint: {path}")
    return 0


def _run_of_options(args: argparse.Namespace, out: Path) -> _Run:
    demo = args.data is None
    defaults = {**_MODEL, **_LOOP, **(_DEMO if demo else {})}
    options = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in defaults.items()
    }
    try:
        loop = LoopOptions(**{name: options[name] for name in _LOOP})
        model = SceneClassifierConfig(
            variant=args.variant, **{name: options[name] for name in _MODEL}
        )
        SceneClassifier(model, device="meta")  # raises what the modules raise
    except ValueError as error:
        raise UserError(str(error)) from None
    data, eval_data = (args.data, args.eval_data) if not demo else _demo_data(out, loop.seed)
    return _Run(
        args.variant, args.backend, data, eval_data, args.corrupt == "stop", model, loop
    )  # fmt: skip


def _demo_data(out: Path, seed: int) -> tuple[str, str]:
    """Globs of the demo's shards, written where they are not there yet."""
    from lam_kernels.data.scene_sequences import write_scene_shards

    folder = out / "data"
    done = folder / "complete.json"
    if _prepared_seed(done) == seed:
        return str(folder / "train-*.tfrecord"), str(folder / "test-*.tfrecord")
    print(f"real sequences of installed packages become TFRecord shards in {folder}", flush=True)
    globs = write_scene_shards(folder, seed)
    atomic_write(done, json.dumps({"seed": seed}))
    return globs


def _prepared_seed(done: Path) -> int | None:
    """None also where the file cannot be understood: the data is then prepared again."""
    try:
        content = json.loads(done.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content.get("seed") if isinstance(content, dict) else None


def _run_of_checkpoint(checkpoint: Checkpoint, args: argparse.Namespace) -> _Run:
    fixed = [
        name
        for name in ("variant", "out", *_MODEL, *_LOOP)
        if name != "epochs" and getattr(args, name) is not None
    ]
    if fixed:
        option = "--" + fixed[0].replace("_", "-")
        raise UserError(f"{option} cannot be given with --resume: the checkpoint decides it")
    run = _checked_run(checkpoint, args.backend, args.corrupt == "stop")
    if args.epochs is not None:
        run.loop = dataclasses.replace(run.loop, epochs=args.epochs)
    if checkpoint.epoch >= run.loop.epochs:
        raise UserError(
            f"{checkpoint.path}: epoch {checkpoint.epoch} of {run.loop.epochs} is done already: "
            "give a larger --epochs to go on"
        )
    if args.data is not None:
        run.data = args.data
    if args.eval_data is not None:
        run.eval_data = args.eval_data
    return run


def _refuse_changed_clips(run: _Run, checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """A resumed run goes on with the clips of its checkpoint, except for those that are given."""
    config = checkpoint.config
    if run.eval_data is None:
        if run.data == config["data"]:
            _refuse_drawn_again(run, checkpoint, "--eval-data")
        return
    if args.data is None and config["eval_data"] is not None:
        _refuse_changed(checkpoint, run.data, len(run.train), config["train_clips"], "--data")
    if args.eval_data is None:
        _refuse_changed(
            checkpoint, run.eval_data, len(run.test), config["test_clips"], "--eval-data"
        )


def _refuse_drawn_again(run: _Run, checkpoint: Checkpoint, option: str) -> None:
    """A fifth of another list is another fifth: clips of the training would be tested on."""
    _refuse_changed(
        checkpoint, run.data, len(run.train) + len(run.test),
        checkpoint.config["train_clips"] + checkpoint.config["test_clips"],
        f"{option} with clips that were not trained on",
    )  # fmt: skip


def _refuse_changed(
    checkpoint: Checkpoint, pattern: str, found: int, recorded: int, what: str
) -> None:
    if found != recorded:
        raise UserError(
            f"{pattern}: the clips changed, {found} are found and {checkpoint.path} was written "
            f"with {recorded}: give {what}"
        )


def _checked_run(checkpoint: Checkpoint, backend: str | None, fatal: bool) -> _Run:
    """What a checkpoint says of its run, checked before anything is built from it."""
    config, path = checkpoint.config, checkpoint.path
    for record, types in (
        ("variant", (str,)), ("backend", (str, type(None))), ("data", (str,)),
        ("eval_data", (str, type(None))),
    ):  # fmt: skip
        if type(config.get(record)) not in types:
            raise UserError(f"{path}: the record config.{record} is {config.get(record)!r}")
    for record in ("train_clips", "test_clips"):
        count = config.get(record)
        if type(count) is not int or count < 1:
            raise UserError(f"{path}: the record config.{record} is {count!r}, expected a number")
    parts = []
    for record, kind in (("model", SceneClassifierConfig), ("loop", LoopOptions)):
        try:
            parts.append(kind(**config.get(record)))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: the record config.{record} is not valid ({error})") from None
    model, loop = parts
    if config["variant"] != model.variant:
        raise UserError(f"{path}: the variant {config['variant']} is not the model's")
    try:
        skeleton = SceneClassifier(model, device="meta")
    except ValueError as error:
        raise UserError(f"{path}: the record config.model is not valid ({error})") from None
    checkpoint.check_model(skeleton.state_dict())
    return _Run(
        model.variant, backend or config["backend"], config["data"], config["eval_data"], fatal,
        model, loop,
    )  # fmt: skip


@torch.no_grad()
def _measure(model: SceneClassifier, run: _Run, device: str) -> tuple[LabelMetrics, int]:
    """The four metrics on the test clips that can be read, and how many those are."""
    from lam_kernels.data.youtube8m import collate

    was_training = model.training
    model.eval()
    source = run.eval_data or run.data
    meter, count, labelled = LabelMeter(), 0, False
    for indices in torch.arange(len(run.test)).split(run.loop.batch_size):
        clips = run.test.clips(indices.tolist())
        if not clips:
            continue
        visual, audio, frames, labels = collate(clips, run.model.classes, run.model.max_len)
        with run.loop.autocast(device):
            logits = model(visual.to(device), audio.to(device), frames.to(device))
        if bool(logits.isnan().any()):
            raise UserError(
                f"{source}: the model's scores of test clips are NaN: train it again with a "
                "smaller --lr"
            )
        meter.add(logits.float().sigmoid(), labels)
        count, labelled = count + len(clips), labelled or bool(labels.any())
    model.train(was_training)
    if not count:
        raise UserError(f"{source}: no test clip can be read")
    if not labelled:
        raise UserError(f"{source}: none of {count} test clips has a label to measure by")
    return meter.metrics(), count


def evaluate(args: argparse.Namespace) -> int:
    checkpoint, run, model = _restored(args)
    found, count = _measure(model, run, args.device)
    print(f"{checkpoint.path}: {run.variant}, epoch {checkpoint.epoch} of {run.loop.epochs}")
    print(f"{count} clips: " + ", ".join(f"{n} {v}" for n, v in _named(found).items()))
    recorded = read_history(checkpoint)["accuracy"]
    if recorded and args.data is None:
        print(f"recorded in training: GAP@20 {recorded[-1]:.4f}")
    if run.test.damage.seen:
        print(run.test.damage.summary())
    return 0


def _restored(args) -> tuple[Checkpoint, _Run, SceneClassifier]:
    apply_machine(args)
    checkpoint = load_checkpoint(args.checkpoint, TASK)
    run = _checked_run(checkpoint, args.backend, args.corrupt == "stop")
    check_backend(run.backend, args.device)
    if args.data is not None:
        run.eval_data = args.data
    if run.eval_data is None:
        run.load()
        _refuse_drawn_again(run, checkpoint, "--data")
    else:
        run.test = _find(run.eval_data, run.model, run.fatal)
        if args.data is None:
            recorded = checkpoint.config["test_clips"]
            _refuse_changed(checkpoint, run.eval_data, len(run.test), recorded, "--data")
    model = SceneClassifier(run.model, backend=run.backend)
    checkpoint.into(model)
    return checkpoint, run, model.to(args.device).eval()


def _named(metrics: LabelMetrics) -> dict[str, str]:
    values = (metrics.gap, metrics.map, metrics.perr, metrics.hit_at_1)
    names = ("GAP@20", "MAP", "PERR", "Hit@1")
    return {name: f"{value:.4f}" for name, value in zip(names, values, strict=True)}


# ---- the variants beside each other


def results_table(results: list[dict]) -> str:
    rows = [
        [
            r["variant"],
            *(f"{r[name]:.4f}" for name in ("gap", "map", "perr", "hit_at_1")),
            f"{r['parameters']:,}",
            f"{r['seconds_per_step']:.3f}",
        ]
        for r in results
    ]
    header = ["attention", "GAP@20", "MAP", "PERR", "Hit@1", "parameters", "s per step"]
    return text_table(header, rows)


def _train_all(args: argparse.Namespace, out: Path) -> int:
    refuse_torchrun("one variant is trained: give --variant")
    if args.data is None:
        _demo_data(out, _LOOP["seed"] if args.seed is None else args.seed)
    print(f"{TASK}: {', '.join(VARIANTS)}, one process each; results go to {out}", flush=True)
    for variant in VARIANTS:
        code = run_process(TASK, [*args.argv, "--variant", variant, "--in-comparison"])
        if code:
            return code
    results = [json.loads((out / variant / RESULT).read_text()) for variant in VARIANTS]
    text = results_table(results)
    text += f"\n\nmedian seconds per full-batch step, whole model, {results[0]['threads']} threads"
    print("\n" + text)
    atomic_write(out / "results.md", text + "\n")
    if not args.no_pictures:
        curves = out / "loss_curves.png"
        pictures.draw_loss_curves(
            curves, {r["variant"]: r["history"] for r in results}, measure_name="GAP@20"
        )
        profile = out / "sensitivity.png"
        code = _draw_sensitivity(
            [out / variant / CHECKPOINT for variant in VARIANTS], 0, "hutchinson", profile
        )
        print(f"pictures: {curves}, {profile}")
        return code
    return 0


# ---- analysis


def analyse(args: argparse.Namespace) -> int:
    """Draws attention profiles and the sensitivity of one clip, and prints its mean."""
    pictures.require_matplotlib()
    path = Path(args.out or Path(args.checkpoint).parent / "sensitivity.png")
    check_writable(path)
    return _draw_sensitivity([Path(args.checkpoint)], args.clip, args.norm, path, args)


def _draw_sensitivity(checkpoints, clip: int, norm: str, path: Path, args=None) -> int:
    from lam_kernels.data.youtube8m import collate

    curves, profiles = {}, {}
    for checkpoint in checkpoints:
        given = args or argparse.Namespace(
            checkpoint=str(checkpoint), data=None, corrupt="skip", backend=None, device="cpu",
            threads=None,
        )  # fmt: skip
        _, run, model = _restored(given)
        clips = run.test.clips([clip]) if 0 <= clip < len(run.test) else []
        if not clips:
            raise UserError(f"--clip must be a readable one of {len(run.test)}, got {clip}")
        batch = collate(clips, run.model.classes, run.model.max_len)
        streams = {"visual": batch[0], "audio": batch[1]}
        pattern = (
            run.model.neighbourhood()
            or dataclasses.replace(run.model, variant="share").neighbourhood()
        )
        near = pattern.dense(batch[2].shape[1], batch[2].shape[1])
        shows_profiles = run.variant != "global" or len(checkpoints) == 1
        for name, x in streams.items():
            block = getattr(model, name)
            found = sensitivity(
                lambda rows, block=block: block(rows[None])[0], x[0].to(given.device), near,
                norm=norm, frames=batch[2][0],
            )  # fmt: skip
            curves[f"{run.variant}, {name}"] = found
            print(f"{run.variant}, {name}: mean sensitivity {float(found.nanmean()):.3f}")
            if shows_profiles:
                with torch.no_grad():
                    maps = block.attention.attention_maps(block.norm(x.to(given.device)))
                for kind, weights in _used_maps(maps, run.variant).items():
                    profiles[f"{name}, {kind}"] = weights[0].mean(0).cpu()
    pictures.draw_sensitivity(path, profiles, curves)
    print(f"picture: {path}")
    return 0


def _used_maps(maps: tuple[Tensor, Tensor], variant: str) -> dict[str, Tensor]:
    """By kind, the maps [B, H, L, L] of the heads that use them: in the baseline no head has a
    local one, in "share" each has one of the two."""
    whole, near = maps
    if variant == "global":
        return {"global": whole}
    if variant == "share":
        half = whole.shape[1] // 2
        return {"global": whole[:, :half], "local": near[:, half:]}
    return {"global": whole, "local": near}
