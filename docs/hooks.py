# SPDX-License-Identifier: Apache-2.0
"""What the site says that stands elsewhere: addresses, pages of the repository's root, tables of the configs' fields.

mkdocs calls these functions by name. Pages ask for a table by `<!-- fields: MEPTConfig -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from peft import PeftConfig

import peft_promptmoe
from peft_promptmoe.config import PromptConfig

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository that are pages of the site as well.
COPIED = {
    "CONTRACT.md": "contract.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")
FIELDS = re.compile(r"<!-- fields: (\w+) -->")

# Whose fields they are.
OWN, SHARED, PEFTS = "Fields of its own", "Fields that all methods share", "Fields of every PEFT config"


def urls() -> dict[str, str]:
    """`[project.urls]`, the one place where the addresses are."""
    found: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url, config.site_url = urls()["Repository"], urls()["Documentation"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in COPIED.items():
        text = LINK.sub(lambda match, source=source: match[1] + _address(match[2], source), read(source))
        files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return FIELDS.sub(lambda match: field_tables(getattr(peft_promptmoe, match[1])), markdown)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _address(link: str, source: str) -> str:
    """Where a link of a copied page leads to on the site: to its copy, its picture, or the repository."""
    path = (ROOT / source).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
    if path in COPIED:
        return COPIED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/results/") and path.endswith(".png"):
        return path.removeprefix("benchmarks/")
    kind = "blob" if (ROOT / path).is_file() else "tree"
    return f"{urls()['Repository']}/{kind}/main/{path}"


def field_tables(config: type[PeftConfig]) -> str:
    """Markdown tables of all fields of a config: its own, then those it inherits."""
    parts = []
    for heading in (OWN, SHARED, PEFTS):
        fields = [field for field in dataclasses.fields(config) if owner(config, field.name) == heading]
        parts += [f"#### {heading}\n", table(config, fields)]
    return "\n".join(parts)


def owner(config: type, name: str) -> str:
    """Under which heading a field stands, by the class that declares it last."""
    declares = next(base for base in config.__mro__ if name in inspect.get_annotations(base))
    if declares.__module__.startswith("peft."):
        return PEFTS
    return SHARED if declares is PromptConfig else OWN


def table(config: type, fields: list[dataclasses.Field[Any]]) -> str:
    hints = get_type_hints(config)
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        cells = [f"`{field.name}`", f"`{shown(hints[field.name])}`", f"`{default(field)}`", field.metadata["help"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def shown(hint: Any) -> str:
    """A type as it is written."""
    text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    return re.sub(r"\b(?:typing|peft\.utils\.peft_types)\.", "", text).replace("NoneType", "None")


def default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return repr(field.default)
