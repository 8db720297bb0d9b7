# SPDX-License-Identifier: Apache-2.0
r"""Optical flow, depth, or both, from a frozen vision transformer, with the stock Trainer.

    python examples/advanced/motion.py                       # flow on DINOv2-S, some eight minutes on two CPU cores
    python examples/advanced/motion.py --task depth --method vapt
    python examples/advanced/motion.py --task joint --method head    # nothing but the heads is trained
    python examples/advanced/motion.py --data /data/MPI-Sintel /data/kitti-2015    # evaluated on these too
    python examples/advanced/motion.py --model facebook/dinov2-base --steps 5000 --batch-size 8

It trains on pairs that are made as it goes (see `moving_layers.py`), and is evaluated on pairs of other photos and on
real ones: scikit-image's stereo pair of a motorcycle, aloe where Debian's opencv-doc is installed, and the folders
that are named. Errors stand beside those of no motion, and of the best single motion for each image: on real pairs so
small a model that has seen made-up pairs only may well be worse. What is saved is loaded in a fresh process, which has
to find the same numbers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import assets
import motion_data
from moving_layers import GeneratedPairs
from peft_promptmoe import (
    AssignmentCallback,
    DepthModel,
    FlowModel,
    MotionModel,
    ProMotionConfig,
    VAPTConfig,
    assignment_report,
)
from peft_promptmoe.motion import (
    DepthError,
    EndPointError,
    MotionDataset,
    depth_picture,
    error_picture,
    find_examples,
    flow_legend,
    flow_picture,
    trainer_metrics,
)

Pairs = Dataset[dict[str, Tensor]]
MODELS = {"flow": FlowModel, "depth": DepthModel, "joint": MotionModel}
# Blocks that are read, counted from 0: features of the middle match best, depth wants the later ones too.
LEVELS = {"flow": [3, 4, 5], "depth": [5, 8, 11]}
# Adapters by the name of their method. "head" trains the heads alone and "full" the backbone with them.
ADAPTERS: dict[str, Any] = {
    "lora": lambda heads: LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=heads
    ),
    "vapt": lambda heads: VAPTConfig(image_size=[SHOWN, SHOWN], modules_to_save=heads),
    "promotion": lambda heads: ProMotionConfig(modules_to_save=heads),
}
SHOWN = 224  # pixels of the shorter side that frames are shown at
PATCH = 14
DEPTHS = {"min_depth": 0.5, "max_depth": 50.0}  # of the pairs that are made


STEPS = {"flow": 400, "depth": 400, "joint": 180}  # what two cores do in some eight minutes


def levels(task: str) -> dict[str, list[int]]:
    """Blocks that each of the task's heads reads."""
    return {name: read for name, read in LEVELS.items() if task in (name, "joint")}


def blocks(task: str) -> list[int]:
    """Blocks that any of them reads, in order."""
    return sorted({block for read in levels(task).values() for block in read})


def base_model(task: str, name: str | None, frozen: bool) -> nn.Module:
    """The model without an adapter; blocks behind the last one that is read are left out."""
    depth = blocks(task)[-1] + 1
    backbone = AutoModel.from_pretrained(name or assets.dinov2_small(), num_hidden_layers=depth)
    return MODELS[task](backbone, levels=levels(task), freeze_backbone=frozen, **DEPTHS)


def make_model(args: argparse.Namespace) -> nn.Module:
    base = base_model(args.task, args.model, frozen=args.method != "full")
    adapter = ADAPTERS.get(args.method)
    return base if adapter is None else get_peft_model(base, adapter(base.head_names))


def load_model(args: argparse.Namespace) -> nn.Module:
    folder = args.output / "model"
    if args.method not in ADAPTERS:
        return MODELS[args.task].from_pretrained(folder)
    return PeftModel.from_pretrained(base_model(args.task, args.model, frozen=True), folder).eval()


def print_sizes(model: nn.Module) -> None:
    counts = {"backbone": 0, "adapter": 0, "heads": 0}
    for path, parameter in model.named_parameters():
        if "original_module" in path:
            continue
        adapted = parameter.requires_grad and isinstance(model, PeftModel)
        kind = "heads" if "_head." in path else "adapter" if adapted else "backbone"
        counts[kind] += parameter.numel()
    print("parameters: " + ", ".join(f"{kind} {count:,}" for kind, count in counts.items()))


class TaskLosses(TrainerCallback):
    """The losses of both tasks beside their sum, which differ in size by an order of magnitude."""

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if logs is not None and "loss" in logs and len(base.last_losses) > 1:
            logs |= {f"{task}_loss": round(float(loss), 4) for task, loss in base.last_losses.items()}


def train(model: nn.Module, args: argparse.Namespace, held_out: Pairs) -> Trainer:
    pairs = GeneratedPairs(motion_data.photos("train"), args.steps * args.batch_size, seed=args.seed)
    metrics = {"flow": [EndPointError()], "depth": [DepthError()], "joint": [EndPointError(), DepthError()]}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=8,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,  # a share of all steps
            max_grad_norm=10.0,
            batch_eval_metrics=True,
            save_strategy="no",
            logging_steps=25,
            dataloader_num_workers=1,  # makes pairs while the model trains
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=pairs,
        eval_dataset=held_out,
        compute_metrics=trainer_metrics(*metrics[args.task]),
        callbacks=[TaskLosses(), *([AssignmentCallback()] if args.method == "promotion" else [])],
    )
    trainer.train()
    return trainer


# -- evaluation -------------------------------------------------------------------------------------------------------


def shown_size(rows: int, columns: int) -> tuple[int, int]:
    """Size at which a frame is shown to the model: the shorter side 224, both of whole patches."""
    scale = SHOWN / min(rows, columns)
    return round(rows * scale / PATCH) * PATCH, round(columns * scale / PATCH) * PATCH


def real_sets(args: argparse.Namespace) -> dict[str, Pairs]:
    """Real examples with labels of this task: those at hand one by one, each folder as one set."""
    sets = {example.name: [example] for example in motion_data.real_pairs()}
    names = [folder.resolve().name for folder in args.data]
    for name, folder in zip(names, args.data, strict=True):
        sets[name if names.count(name) == 1 else str(folder)] = find_examples(folder)
    wanted = {"flow": ["flow"], "depth": ["depth"], "joint": ["flow"]}[args.task]
    kept: dict[str, Pairs] = {}
    for name, examples in sets.items():
        found = [each for each in examples if all(getattr(each, label) is not None for label in wanted)]
        if found:
            kept[name] = ShownAtSize(found)
        else:
            print(f"{name} has no labels for this task and is left out")
    return kept


class ShownAtSize(Dataset[dict[str, Tensor]]):
    """Examples, each shown at a size that suits its own."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = MotionDataset([self.examples[index]])[0]
        size = shown_size(*item["pixel_values"].shape[-2:])
        return item | MotionDataset([self.examples[index]], size=size)[0]


@torch.no_grad()
def evaluate(model: nn.Module, data: Pairs, batch: int, scaled: bool) -> dict[str, float]:
    """Errors on a set. With `scaled` depth is compared after median scaling, and says so in its name."""
    flow, depth = EndPointError(), DepthError(median_scaling=scaled)
    model.eval()
    for rows in DataLoader(data, batch_size=batch):
        output = predict(model, rows)
        if output.flow is not None and "flow_labels" in rows:
            flow.add_batch(predictions=output.flow, references=rows["flow_labels"], occluded=rows.get("occluded"))
        if output.depth is not None and "depth_labels" in rows:
            depth.add_batch(predictions=output.depth, references=rows["depth_labels"])
    return (flow.compute() if len(flow) else {}) | (depth.compute() if len(depth) else {})


def predict(model: nn.Module, rows: dict[str, Tensor]) -> Any:
    """Predictions at the labels' size."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    flow, depth = ("flow" in base.tasks, "depth" in base.tasks)
    names = ["pixel_values"] + flow * ["next_pixel_values", "flow_labels"] + depth * ["depth_labels"]
    device = next(model.parameters()).device
    return model(**{name: rows[name].to(device) for name in names if name in rows})


FLOW_COLUMNS = ("epe", "epe_zero_flow", "epe_constant_flow", "f1_all", "1px", "3px", "5px")
DEPTH_COLUMNS = ("abs_rel", "abs_rel_constant", "sq_rel", "rmse", "rmse_log", "silog", "delta1")


def print_table(scores: dict[str, dict[str, float]]) -> None:
    for columns in (FLOW_COLUMNS, DEPTH_COLUMNS, tuple(f"{column}_median_scaled" for column in DEPTH_COLUMNS)):
        rows = {name: errors for name, errors in scores.items() if columns[0] in errors}
        if not rows:
            continue
        print(f"\n{'':32}" + "".join(f"{c.removesuffix('_median_scaled'):>18}" for c in columns))
        if columns[0].endswith("_median_scaled"):
            print("depth in no unit known: every prediction is scaled to the true median first")
        for name, errors in rows.items():
            print(f"{name[-32:]:32}" + "".join(f"{errors[column]:18.3f}" for column in columns))


def scores_of(model: nn.Module, held_out: Pairs, real: dict[str, Pairs]) -> dict[str, Any]:
    scores = {"held-out pairs": evaluate(model, held_out, batch=8, scaled=False)}
    for name, data in tqdm(real.items(), desc="real pairs"):
        # Depth from disparity is in no known unit; that of a data set is, but not in the one trained on.
        scores[name] = evaluate(model, data, batch=1, scaled=True)
    return scores


# -- pictures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(model: nn.Module, held_out: Pairs, real: dict[str, Pairs], file: Path) -> None:
    """A row for each pair: its frames, true and found flow with the error, true and found depth."""
    model.eval()
    shown: list[tuple[str, dict[str, Tensor]]] = [(f"held out {n}", held_out[n]) for n in range(min(3, len(held_out)))]
    shown += [(name, data[0]) for name, data in list(real.items())[:3]]
    rows = []
    for name, item in shown:
        output = predict(model, {key: value[None] for key, value in item.items()})
        rows.append((name, frames_of(item) + flow_panels(item, output) + depth_panels(item, output)))
    figure = Figure(figsize=(2.5 * max(len(panels) for _, panels in rows), 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), max(len(panels) for _, panels in rows), squeeze=False)
    for line, (name, panels) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, picture) in zip(line, panels, strict=False):
            axis.imshow(picture)
            axis.set_title(title, fontsize=8)
            if title.startswith("true flow"):
                inset = axis.inset_axes((0.0, 0.0, 0.22, 0.22))
                inset.imshow(flow_legend())
                inset.set_axis_off()
        line[0].set_title(name, fontsize=8)
    figure.savefig(file, dpi=110)


def frames_of(item: dict[str, Tensor]) -> list[tuple[str, Any]]:
    frames = [item[name] for name in ("pixel_values", "next_pixel_values") if name in item]
    low, high = frames[0].min(), frames[0].max()
    return [(f"frame {n}", ((f - low) / (high - low)).clamp(0, 1).permute(1, 2, 0)) for n, f in enumerate(frames, 1)]


def flow_panels(item: dict[str, Tensor], output: Any) -> list[tuple[str, Any]]:
    if output.flow is None or "flow_labels" not in item:
        return []
    true, found = item["flow_labels"], output.flow[0].cpu()
    error = (found - true).norm(dim=0)
    length = true.norm(dim=0)
    top = float(length[length.isfinite()].quantile(0.98))
    mean = float(error[error.isfinite()].mean())
    return [
        (f"true flow, up to {top:.0f} px", flow_picture(true, top)),
        ("found flow", flow_picture(found, top)),
        (f"error, mean {mean:.1f} px", error_picture(found, true, max_error=top)),
    ]


def depth_panels(item: dict[str, Tensor], output: Any) -> list[tuple[str, Any]]:
    if output.depth is None or "depth_labels" not in item:
        return []
    true, found = item["depth_labels"], output.depth[0].cpu()
    known = true.isfinite() & (true > 0)
    near, far = float(true[known].min()), float(true[known].max())
    scaled = found * (true[known].median() / found[known].median())
    return [
        ("true depth", depth_picture(true, near, far)),
        ("found depth, at its median", depth_picture(scaled, near, far)),
    ]


@torch.no_grad()
def draw_prototypes(model: nn.Module, pair: dict[str, Tensor], file: Path) -> None:
    """Which prototype took which patch of a pair, behind every unit: one colour is one prototype in both frames."""
    model.eval()
    predict(model, {key: value[None] for key, value in pair.items()})
    report = assignment_report(model)
    print(f"\n{report}")
    report.plot(file, images=range(len(report.maps[0])))


# -- main -------------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()  # nothing about the weights of blocks that are left out
    set_seed(args.seed)
    held_out = GeneratedPairs(motion_data.photos("test"), args.test_pairs, seed=args.seed + 1000)
    real = real_sets(args)  # before training: a folder that cannot be read must not cost it
    if args.evaluate:
        (args.output / "reloaded.json").write_text(json.dumps(scores_of(load_model(args), held_out, real)))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    model = make_model(args)
    print_sizes(model)
    trainer = train(model, args, held_out)
    trainer.model.save_pretrained(args.output / "model")
    print(f"eval_loss on held-out pairs: {trainer.evaluate()['eval_loss']:.3f}")
    scores = scores_of(trainer.model, held_out, real)
    print_table(scores)
    (args.output / "scores.json").write_text(json.dumps(scores, indent=2))
    draw(trainer.model, held_out, real, args.output / "motion.png")
    print(f"\npicture: {args.output / 'motion.png'}")
    if args.method == "promotion":
        draw_prototypes(trainer.model, held_out[0], args.output / "prototypes.png")
        print(f"prototypes of both frames: {args.output / 'prototypes.png'}")
    print("loading what was saved in a fresh process ...", flush=True)
    subprocess.run([sys.executable, __file__, "--evaluate", *sys.argv[1:]], check=True)
    again = json.loads((args.output / "reloaded.json").read_text())
    if again != json.loads(json.dumps(scores)):
        raise SystemExit("The model that was loaded answers differently from the one that was saved.")
    print("the same numbers")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(MODELS), default="flow")
    parser.add_argument("--method", choices=["head", "full", *ADAPTERS], default="promotion")
    parser.add_argument(
        "--model", help="Hub id or folder of a backbone of 12 blocks, patches of 14 pixels (default: DINOv2-S)"
    )
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="folders of data sets to evaluate on too")
    parser.add_argument("--steps", type=int, help="default: what two cores do in some eight minutes")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--test-pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: outputs/motion/TASK-METHOD")
    parser.add_argument("--evaluate", action="store_true", help="load what --output holds, evaluate it, nothing else")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = STEPS[args.task]
    for name in ("steps", "batch_size", "test_pairs", "lr"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.output is None:
        args.output = Path("outputs/motion") / f"{args.task}-{args.method}"
    if args.evaluate and not (args.output / "model").is_dir():
        parser.error(f"--evaluate: {args.output / 'model'} is no folder")
    return args


if __name__ == "__main__":
    main(parse_args())
