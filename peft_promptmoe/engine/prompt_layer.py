# SPDX-License-Identifier: Apache-2.0
"""The prompt layer: a child module of one frozen attention layer that holds its prompts."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD, AdapterState, SharedLayer
from ..models.sites import Site
from ..routing.prompt_call import CallBook, PromptCall
from ..routing.record import Chosen, Observer, RoutingRecord, joined
from .grid_book import GridBook
from .notes import Notes

PROMPT_CALL = "promptmoe_call"
STEPS = 32  # records of a generation that are stored separately before they are joined


class PromptLayer(AdapterState):
    """Base of all prompt layers. A form of joining is a subclass, and a method is a subclass of that.

    The layer is registered as a child of the attention layer and called by hooks. So module types and parameter names
    of the base model do not change. The hooks are bound methods of this module, so that a deep copy of the model is
    independent of the original.

    Args:
        site: the attention layer and its surroundings.
    """

    method: ClassVar[str]
    # Why an adapter has no router; the end of a sentence that starts with the method.
    unrouted: ClassVar[str] = "has no router"
    # How the adapter changes the model; used in the refusal to merge.
    joins_as: ClassVar[str] = "its prompts are extra attention rows"
    # Name of the attribute with which the layer attaches notes to tensors.
    note_name: ClassVar[str] = "_promptmoe_note"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        # For each adapter, records of the last forward pass, or of all forward passes of a generation.
        self.last_routing: dict[str, list[RoutingRecord]] = {}
        self.observers: list[Observer] = []
        self.grids: GridBook | None = None
        self.calls = CallBook()  # replaced by the model's own when the layer is registered
        self.shared: tuple[
            SharedLayer, ...
        ] = ()  # a tuple, so that the shared module is not registered as a submodule
        self.notes = Notes(self.note_name)
        self._handles: list[Any] = []

    # -- what a form defines ------------------------------------------------------------------------------------------

    @abstractmethod
    def hook(self) -> list[Any]:
        """Register the hooks that add the prompts, and return their handles."""

    def unhook(self) -> None:
        """Undo `hook`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def adapters_of(self, call: PromptCall | None) -> list[str]:
        """The adapters used in a forward pass: those named for its samples, otherwise the active ones."""
        if call is None or call.names is None or self.disable_adapters:
            return self.working_adapters()
        return [name for name in dict.fromkeys(call.names) if name in self.prompt_config]

    # -- what a method defines ----------------------------------------------------------------------------------------

    def has_router(self, adapter: str) -> bool:
        """Whether the adapter has a router in this layer."""
        return False

    def needs_call(self, adapter: str) -> bool:
        """Whether the layer needs the base model's `PromptCall` in the current mode."""
        return False

    def reads_query(self, adapter: str) -> bool:
        """Whether the layer's router pools the input of a causal language model. It must then not see answers."""
        return False

    def pools_rows(self, adapter: str) -> bool:
        """Whether the layer's router reads whole rows. A row must then hold one sample only."""
        return False

    def needs_patches(self, adapter: str) -> bool:
        """Whether the adapter needs all patches of an image."""
        return self.uses_grid(adapter)

    def uses_grid(self, adapter: str) -> bool:
        """Whether the adapter needs rows and columns of the patch grid."""
        return False

    def adds_losses(self, adapter: str) -> bool:
        """Whether the layer adds auxiliary losses in the current mode."""
        return False

    def leaves_word(self, adapter: str) -> bool:
        """Whether the layer stores an update in the current mode, which the method applies later."""
        return False

    def meet(self, layers: list[Any]) -> None:
        """Get to know all layers of the model, including this one. Called after each injection."""

    @classmethod
    def before_training(cls, layers: list[Any]) -> None:
        """Called before a forward pass in which the layers store updates."""

    @classmethod
    def after_training(cls, layers: list[Any]) -> None:
        """Called after such a forward pass, on all processes."""

    def settle(self) -> None:
        """Apply pending updates. Called when the model switches to evaluation mode."""

    def wants_shared(self, adapter: str) -> bool:
        """Whether the layer uses the state that the method's layers share."""
        return False

    # -- PEFT's layer contract ----------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        return self.site.attention

    # -- in and out of the model --------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Register this layer as a child of the attention layer, and add the hooks."""
        self.site.attention.add_module(PROMPT_CHILD, self)
        self._handles = self.hook()

    def detach(self) -> None:
        """Undo `attach`."""
        self.unhook()
        if getattr(self.site.attention, PROMPT_CHILD, None) is self:
            delattr(self.site.attention, PROMPT_CHILD)

    def note_step(self, adapter: str, before: list[RoutingRecord]) -> None:
        """Put the records of a generation's earlier steps in front of the one just stored."""
        steps = [*before, *self.last_routing[adapter]]
        self.last_routing[adapter] = joined(steps) if len(steps) > STEPS else steps

    def note(self, adapter: str, gates: Tensor | Chosen, real: Tensor | None) -> None:
        """Store what a router chose, for reports, and notify listeners."""
        record = RoutingRecord(gates.detach(), real, self.training)
        self.last_routing[adapter] = [record]
        for observer in self.observers:
            observer(self.site.name, adapter, record)


def no_call(attention: nn.Module) -> str:
    return (
        f"{type(attention).__name__} was called outside a forward pass of the model that contains it, or is run "
        "again by checkpointing in a model that does not pass keyword arguments on. So its prompt layer cannot know "
        "which tokens are the query, or update a router's centre. Call the model or its encoder instead of single "
        "blocks, turn checkpointing off, or use routing='token' (causal models) and router_centering=False."
    )
