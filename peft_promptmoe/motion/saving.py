# SPDX-License-Identifier: Apache-2.0
"""Saves a model for flow or depth with its backbone, and loads it from a folder or the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..sharing.load_checks import fits

WEIGHTS, CONFIG, BACKBONE = "model.safetensors", "config.json", "backbone"
STAGES = ("out_features", "out_indices", "stage_names")
TIMM_ARGUMENTS = ("num_classes", "global_pool")


CARD = """---
{{ card_data }}
---

# {{ model_class }}

A model for optical flow or depth on a vision backbone. To load it:

```
pip install peft-promptmoe
```

```python
from peft_promptmoe import {{ model_class }}

model = {{ model_class }}.from_pretrained(".")  # this folder, or the id of this repository on the Hub
```
"""


class Saved(ModelHubMixin, library_name="peft_promptmoe", tags=["optical-flow", "depth-estimation"]):
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A saved folder holds the heads (`model.safetensors`), the model's arguments (`config.json`), and in `backbone/`
    what the backbone's own library saves. Weights are stored as safetensors only, and no code is loaded from a folder.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        model: Any = self
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                f"This {type(self).__name__} carries an adapter. Call save_pretrained of the PeftModel, which saves "
                "adapter and heads. Or remove the adapter (unload, merge_and_unload) and save again."
            )
        own = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(f"{BACKBONE}.")}
        save_file(own, save_directory / WEIGHTS, metadata={"format": "pt"})
        library = _save_backbone(model.backbone, save_directory / BACKBONE)
        config = {**model.settings, "model_class": type(self).__name__, "backbone_library": library}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def generate_model_card(self, **values: Any) -> ModelCard:
        """Return the model card, which shows how to load the model."""
        data = self._hub_mixin_info.model_card_data
        return ModelCard.from_template(data, template_str=CARD, model_class=type(self).__name__, **values)

    @classmethod
    def from_pretrained(cls: Any, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Any:
        """Load the model from a folder or the Hub. The arguments are those of `huggingface_hub.ModelHubMixin`.

        Other arguments are the model's own, and take the place of saved ones.

        Raises:
            OSError: there is no such folder, and the name is no id of a repository.
            ValueError: the folder holds another model, or no backbone that can be loaded.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **arguments)
        except HFValidationError as error:
            name = str(pretrained_model_name_or_path)
            raise OSError(f"{name!r} is neither a folder here nor the id of a repository on the Hub.") from error

    @classmethod
    def _from_pretrained(
        cls: Any,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
        backbone: nn.Module | None = None,
        **arguments: Any,
    ) -> Any:
        """Load the model from a folder or a Hub repository.

        Args:
            backbone: backbone to use instead of the saved one. Needed if the backbone is neither of transformers nor
                of timm, because such a backbone is not saved.

        Raises:
            ValueError: the folder holds another model, or no backbone that can be loaded.
        """
        if Path(model_id).is_dir():
            folder = Path(model_id)
        else:
            found = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=["*.json", "*.safetensors"],
            )
            folder = Path(found)
        stored = config or {}
        if not stored and (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{model_id!r} has weights, but not the {CONFIG} that save_pretrained writes. A checkpoint of the "
                "Trainer is such a folder: make the model as for training, and call "
                f"model.load_state_dict(safetensors.torch.load_file({str(folder / WEIGHTS)!r})). To load it in one "
                "step next time, save it with trainer.model.save_pretrained(folder)."
            )
        if stored.get("model_class") != cls.__name__:
            raise ValueError(
                f"{model_id!r} holds {stored.get('model_class') or 'no model of motion or depth'}, not {cls.__name__}."
            )
        if backbone is None:
            backbone = _load_backbone(folder / BACKBONE, stored.get("backbone_library"), model_id)
        model = cls(backbone, **arguments)
        _load_as_stored(model, folder / WEIGHTS, elsewhere=f"{BACKBONE}.")
        model.name_or_path = model_id  # PEFT writes this name into adapters, and AutoPeftModel reads it
        return model.eval()


def _save_backbone(backbone: nn.Module, folder: Path) -> str | None:
    """Save a backbone in the format of its library.

    Returns:
        The library, "transformers" or "timm". None for any other backbone, which is not saved.
    """
    if isinstance(backbone, PreTrainedModel):
        backbone.save_pretrained(folder)
        if not hasattr(backbone, "out_indices"):
            _drop_stages(folder / CONFIG)
        return "transformers"
    if hasattr(backbone, "pretrained_cfg") and type(backbone).__module__.startswith("timm."):
        from timm.models import save_for_hf

        save_for_hf(backbone, str(folder), model_args=_timm_arguments(backbone), safe_serialization=True)
        return "timm"
    return None


def _drop_stages(file: Path) -> None:
    """Remove the config entries that only an AutoBackbone reads.

    The config of a model that was loaded with fewer blocks (`num_hidden_layers=6`) still names the old last stage in
    them, and transformers would refuse to load it.
    """
    config = json.loads(file.read_text())
    kept = {key: value for key, value in config.items() if key not in STAGES}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _timm_arguments(backbone: Any) -> dict[str, Any]:
    """The arguments that are needed to create the same timm model again."""
    found = {name: getattr(backbone, name, None) for name in TIMM_ARGUMENTS}
    found = {name: value for name, value in found.items() if isinstance(value, int | str)}  # a ResNet's is a layer
    embedding = getattr(backbone, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    if size is not None:
        found["img_size"] = list(size)
    if getattr(backbone, "dynamic_img_size", False):
        found["dynamic_img_size"] = True
    return found


def _load_backbone(folder: Path, library: str | None, name: str) -> nn.Module:
    if library == "transformers" and (folder / CONFIG).is_file():
        architecture = (json.loads((folder / CONFIG).read_text()).get("architectures") or [""])[0]
        # Only transformers' own classes: a name in a file must not choose what is imported.
        cls: Any = getattr(transformers, str(architecture), None)
        if cls is transformers.TimmBackbone:
            # its own from_pretrained takes names of timm only
            return _with_weights(cls(transformers.TimmBackboneConfig.from_pretrained(folder)), folder)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls.from_pretrained(folder, use_safetensors=True)
    elif library == "timm" and (folder / CONFIG).is_file():
        import timm

        return _with_weights(timm.create_model(f"local-dir:{folder}", pretrained=False), folder)
    raise ValueError(
        f"{name!r} holds no backbone of transformers or timm. Create the backbone and pass it: "
        "from_pretrained(path, backbone=backbone)."
    )


def _with_weights(backbone: nn.Module, folder: Path) -> nn.Module:
    """A backbone with the weights in a folder, in the precision that they have there, which timm would make single."""
    _load_as_stored(backbone, folder / WEIGHTS)
    return backbone


def _load_as_stored(model: nn.Module, file: Path, elsewhere: str | None = None) -> None:
    """Copy a file's tensors into a model, which takes their precision and keeps its device.

    Args:
        model: the model.
        file: the file.
        elsewhere: start of the names of tensors that another file holds.

    Raises:
        ValueError: the file is damaged, or its tensors are not those of the model.
    """
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not complete or damaged: {error}.") from error
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors and not (elsewhere and name.startswith(elsewhere))]
    unexpected = [name for name in tensors if name not in expected]
    other = [name for name in tensors if name in expected and not fits(tensors[name], expected[name])]
    if missing or unexpected or other:
        raise ValueError(
            f"The weights in {file} do not fit this model: missing {missing}, unexpected {unexpected}, of another "
            f"shape {other}. Load them with the backbone and the settings that they were saved with."
        )
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            own.data = own.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=False)
