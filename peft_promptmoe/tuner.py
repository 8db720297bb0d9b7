# SPDX-License-Identifier: Apache-2.0
"""Base of the method tuners: adds prompt layers to a model, removes and switches them, and checks the config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .adapter_state import PROMPT_CHILD, AdapterState, SharedLayer
from .checks import (
    check_attention,
    check_layers,
    check_saved_modules,
    check_tokens,
    is_target,
    no_match,
    warn_of_frozen_head,
)
from .config import PromptConfig
from .engine.choice import join_all, join_what_can_be
from .engine.key_value import KeyValueLayer
from .engine.mixed_batch import mixed_batch
from .engine.model_hooks import ModelHooks, prompt_layers
from .engine.prompt_layer import PromptLayer
from .engine.rehearsal import try_generic
from .engine.token_form import TokenForm
from .models.heads import apart, vision_heads
from .models.patches import Patches
from .models.sites import Site
from .models.targets import check_at_hand, default_targets, is_encoder_decoder
from .sharing.adapter_names import check_adapter_name, check_apart
from .sharing.base_model import base_model_card
from .sharing.base_record import check_base, note_base
from .sharing.rollback import Unread
from .sharing.saved_modules import saved_modules, take_saved_modules_out

# Heads of transformers models that PEFT does not know: it only adds `classifier` and `score`.
MORE_HEADS = {"SEQ_CLS": ("pre_classifier", "classification_head")}


class PromptTuner(BaseTuner):
    """Base of the method tuners.

    A subclass sets `prefix`, `method`, `prompt_layer_cls` and `tuner_layer_cls` (the class of all its state). It may
    override `resolve`, `check_site` and the other methods of the first section.
    """

    prefix: str
    method: str
    tuner_layer_cls: type[AdapterState]
    prompt_layer_cls: type[PromptLayer]
    # Whether the method changes outputs of whole blocks only, so that attention within windows does not matter.
    joins_windows: ClassVar[bool] = False
    target_module_mapping = {}  # noqa: RUF012  declared by BaseTuner

    # -- what a method may define -------------------------------------------------------------------------------------

    # Class of the state that all layers of the method share, one per model. None: they share nothing.
    shared_layer_cls: type[SharedLayer] | None = None
    # Config and saved modules of another method's adapter with the same name as this tuner's first adapter.
    _replaced: dict[str, Any]
    _not_ours: list[nn.Module]

    def default_targets(self) -> str | list[str]:
        """Return the attention layers to prompt if the user names none. ValueError if the model has none."""
        return default_targets(self.model)

    def resolve(self, config: Any, sites: list[Site]) -> None:
        """Fill in settings of the config that depend on the model. Called before the model is changed."""

    def initialize(self, config: Any, adapter_name: str) -> None:
        """Initialise the tensors of a new adapter by running the model. Called after its layers were added."""

    def check_site(self, config: Any, site: Site) -> None:
        """Raise ValueError if the config cannot work at this attention layer."""

    def prepare_shared(self, shared: Any, adapter_name: str) -> None:
        """Pass what `resolve` found for an adapter to the shared layer. Called before it makes its tensors."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT keeps configs on the model by adapter name, so this adapter replaces another one of the same name.
        held = getattr(model, "peft_config", {})
        vars(self)["_replaced"] = {adapter_name: held[adapter_name]} if adapter_name in held else {}
        vars(self)["_not_ours"] = saved_modules(model) if adapter_name in held else []
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # -- checks before the model is touched ---------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add prompt layers to the model's attention layers, as PEFT's `BaseTuner.inject_adapter`.

        Raises:
            ValueError: the adapter's name or its config does not fit the model. The model is then unchanged.
        """
        check_adapter_name(adapter_name, self.prefix)
        check_apart(adapter_name, model)
        state_dict = kwargs.get("state_dict")
        if state_dict is not None:
            # PEFT takes the path before the prefix for the target module. Here the prompt layer's name stands between.
            inner = f".{PROMPT_CHILD}.{self.prefix}"
            kwargs["state_dict"] = {key.replace(inner, f".{self.prefix}"): value for key, value in state_dict.items()}
        unread = Unread(self, adapter_name, self._replaced.get(adapter_name))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config = self.peft_config[adapter_name]
            # An adapter that is loaded for inference gets its values from a file, so it is not initialised.
            layers = prompt_layers(model)
            try_generic(model, layers)
            if not config.inference_mode and not any(p.is_meta for layer in layers for p in layer.parameters()):
                self.initialize(config, adapter_name)
        except BaseException:
            unread.take_back()
            raise
        hooks: Any = getattr(model, PROMPT_CHILD)
        hooks.watch(model, unread)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PromptConfig:
        check_base(peft_config, self.model)
        if peft_config.modules_to_save:
            peft_config.modules_to_save = apart(self.model, peft_config.modules_to_save, self._own_names())
        chosen = peft_config.target_modules is None
        if chosen:
            found = self.default_targets()
            peft_config.target_modules = found if isinstance(found, str) else set(found)
        paths = [path for path, _ in self.model.named_modules() if path and f"{PROMPT_CHILD}." not in f"{path}."]
        paths = [path for path in paths if self._check_target_module_exists(peft_config, path)]
        if not paths:
            raise ValueError(no_match(self.model, peft_config, chosen))
        for path in paths:
            check_at_hand(self.model.get_submodule(path), path)
        join = join_what_can_be if chosen else join_all
        sites = join(self.model, paths, issubclass(self.prompt_layer_cls, KeyValueLayer), self.joins_windows)
        if len(sites) < len(paths):
            peft_config.target_modules = {site.name for site in sites}
        check_layers(self.model, peft_config, sites, chosen)
        for site in sites:
            if issubclass(self.prompt_layer_cls, KeyValueLayer):
                check_attention(site)
            if not isinstance(getattr(site.attention, PROMPT_CHILD, None), (self.prompt_layer_cls, type(None))):
                raise ValueError(
                    f"{site.name!r} already carries prompts of another method, and {self.method} cannot share an "
                    "attention layer with it. Unload that adapter first."
                )
        self._save_heads(peft_config, next((site.patches for site in sites if site.patches is not None), None))
        warn_of_frozen_head(self.model, peft_config, sites)
        check_saved_modules(self.model, peft_config, sites)
        check_tokens(self.model, peft_config)
        self.resolve(peft_config, sites)
        for site in sites:
            self.check_site(peft_config, site)
        note_base(peft_config, self.model, [site.name for site in sites])
        self._sites = {site.name: site for site in sites}
        return peft_config

    def _save_heads(self, config: PromptConfig, patches: Patches | None) -> None:
        """Train and save heads that PEFT's task wrappers do not know. `modules_to_save=[]`: no image head."""
        present = dict(self.model.named_children())
        heads = [head for head in MORE_HEADS.get(str(config.task_type or ""), ()) if head in present]
        if patches is not None and config.task_type is None and config.modules_to_save != []:
            heads += vision_heads(self.model, patches)
        if heads:
            config.modules_to_save = apart(self.model, [*(config.modules_to_save or ()), *heads], self._own_names())
        config.card_base = base_model_card(self.model)  # type: ignore[misc]

    def _own_names(self) -> set[str]:
        """Names of the modules that the method adds to the base model."""
        holders = [cls for cls in (self.prompt_layer_cls, self.shared_layer_cls) if cls is not None]
        names = (name for cls in holders for name in cls.adapter_layer_names + cls.other_param_names)
        return {PROMPT_CHILD, *names}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if getattr(model, PROMPT_CHILD, None) is None:
            ModelHooks(model).attach(model)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return is_target(self.model, peft_config, key)

    # -- in and out ---------------------------------------------------------------------------------------------------

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(target, PROMPT_CHILD, None)
        if layer is None:
            site = self._sites[current_key]
            layer = self.prompt_layer_cls(site)
            layer.update_layer(adapter_name, peft_config)
            layer.train(self.model.training)
            layer.attach()
            if isinstance(layer, KeyValueLayer) and self._is_read_by_decoder(site):
                TokenForm(layer, self.model.get_decoder()).attach()
        else:
            layer.update_layer(adapter_name, peft_config)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        self._share(layer, adapter_name, peft_config)

    def _share(self, layer: PromptLayer, adapter_name: str, config: Any) -> None:
        """Connect the layer to what it shares with other layers: the record of patch grids, and shared state."""
        hooks: Any = getattr(self.model, PROMPT_CHILD)
        if layer.needs_patches(adapter_name) and layer.grids is None:
            layer.grids = hooks.grid_book(layer.site.patches)
            layer.grids.readers.append(layer)
        if self.shared_layer_cls is None or not layer.wants_shared(adapter_name):
            return
        shared = hooks.shared_layer(self.shared_layer_cls, self.method, layer.site)
        layer.shared = (shared,)
        shared.join(layer)
        if adapter_name not in shared.prompt_config:
            self.prepare_shared(shared, adapter_name)
            shared.update_layer(adapter_name, config)
            shared._move_adapter_to_device_of_base_layer(adapter_name)

    def _is_read_by_decoder(self, site: Site) -> bool:
        """Whether this attention layer is in the last encoder block of an encoder-decoder model."""
        if not is_encoder_decoder(self.model):
            return False
        blocks = site.name.split(f".{site.index}.")[0]
        return site.index == len(self.model.get_submodule(blocks)) - 1

    def layers(self) -> list[PromptLayer]:
        """The method's prompt layers in the model."""
        return [layer for layer in prompt_layers(self.model) if isinstance(layer, self.prompt_layer_cls)]

    def take_out(self, layers: list[PromptLayer]) -> None:
        """Remove prompt layers of the method from the model, and their shared state when no layer is left."""
        hooks: Any = getattr(self.model, PROMPT_CHILD, None)
        if hooks is None:
            return
        for layer in layers:
            layer.detach()
        hooks.disown(self.method, layers)
        if not prompt_layers(self.model):
            hooks.detach(self.model)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        self.take_out(self.layers())
        if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            return super()._unload_and_optionally_merge(False, *args, **kwargs)
        # PEFT's method would also remove other methods' adapters, which were in the model before this tuner.
        own = [name for name, config in self.peft_config.items() if config.peft_type == self.prefix[:-1].upper()]
        take_saved_modules_out(self.model, own, but=self._not_ours)
        for name in own:
            del self.peft_config[name]
        self.peft_config.update(self._replaced)
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(self.model.active_adapter)
        return self.model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method also copies weight and bias, and a head of several layers has none.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{self.method} cannot be merged into the base weights: {self.prompt_layer_cls.joins_as}, and no "
            "weight is changed. Keep the adapter loaded, or call unload() to get the base model back."
        )

    def unmerge_adapter(self) -> None:
        """Refuse, like `merge_adapter`: prompts are not merged into weights.

        Raises:
            ValueError: always.
        """
        self._check_merge_allowed()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse. A method whose adapters can be combined overrides this.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"Adapters of {self.method} cannot be combined into one. Switch them with set_adapter().")

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Calls the base model and not its `forward`, because its hooks handle labels and the balance loss.
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        with mixed_batch(self.model, names, self.method) if names is not None else nullcontext():
            yield
