# SPDX-License-Identifier: Apache-2.0
"""README's quick start to the letter: the wheel in a fresh environment, then each code block in a process of its own.

    python tests/docs/quick_start.py                     # installs everything anew and reads the Hub
    python tests/docs/quick_start.py --reuse             # takes torch and the like from this environment
    python tests/docs/quick_start.py --reuse --packaged  # and the model from a package, for machines without a Hub

It fails where the output is not the one that README shows; probabilities may differ by 0.05.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1" * 40
LINE = re.compile(r"^(\w+) (\d\.\d\d)  (.*)$", re.MULTILINE)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Standard output of a command, shown as it is."""
    print("$", " ".join(part.replace("\n", "; ")[:80] for part in command), flush=True)
    done = subprocess.run(command, cwd=folder, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"The command ended with {done.returncode}.")
    return done.stdout


def install(folder: Path, reuse: bool) -> Path:
    """The Python of a fresh environment in `folder` that has the wheel."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    source = folder / "source"  # a copy, since building leaves files that would end in the next wheel
    shutil.copytree(ROOT / "peft_promptmoe", source / "peft_promptmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "dist", str(source)], folder, outside)
    (wheel,) = (folder / "dist").glob("*.whl")
    print("made", wheel.name)
    venv.create(folder / "fresh", with_pip=True)
    python = folder / "fresh" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(
        [str(python), "-m", "pip", "install", "--quiet", *(["--no-deps"] if reuse else []), str(wheel)],
        folder,
        outside,
    )
    if reuse:
        found = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder, outside)
        # Behind the fresh environment's own packages; this one's .pth files, an editable install's too, are not read.
        (Path(found.strip()) / "reused.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def packaged_hub(folder: Path) -> Path:
    """A Hub cache that has the quick start's model, taken from a package."""
    sys.path.insert(0, str(ROOT / "examples" / "advanced"))
    import assets

    held = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    (held / "refs").mkdir(parents=True)
    (held / "snapshots").mkdir()
    (held / "refs" / "main").write_text(REVISION, encoding="utf-8")
    (held / "snapshots" / REVISION).symlink_to(assets.minilm())
    return folder / "hub"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", action="store_true", help="install the wheel only, and use what this Python has")
    parser.add_argument("--packaged", action="store_true", help="take the model from a package, without a Hub")
    args = parser.parse_args()
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quick start")[1].split("\n## ")[0]
    train, predict = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shown = LINE.findall(re.findall(r"```text\n(.*?)```", section, re.DOTALL)[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = str(install(folder, args.reuse))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if args.packaged:
            environment |= {"HF_HUB_CACHE": str(packaged_hub(folder)), "HF_HUB_OFFLINE": "1"}
        where = run([python, "-c", "import peft_promptmoe; print(peft_promptmoe.__file__)"], folder, environment)
        if not where.startswith(str(folder.resolve())):
            raise SystemExit("The package is not the one that was installed from the wheel.")
        run([python, "-c", train], folder, environment)
        print(f"the adapter's file has {(folder / 'adapter/adapter_model.safetensors').stat().st_size:,} bytes")
        printed = LINE.findall(run([python, "-c", predict], folder, environment))
    same = len(printed) == len(shown) and all(
        (label, text) == (expected, read) and abs(float(share) - float(stated)) <= 0.05
        for (label, share, text), (expected, stated, read) in zip(printed, shown, strict=True)
    )
    if not same:
        raise SystemExit(f"README shows {shown}.")
    print("as README shows it")


if __name__ == "__main__":
    main()
