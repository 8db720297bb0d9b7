# SPDX-License-Identifier: Apache-2.0
"""The prompt layer: a child of one frozen attention layer that holds its prompts, whatever form they join in."""

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
STEPS = 32  # records of a generation that are kept apart before they are joined


class PromptLayer(AdapterState):
    """Prompts of one attention layer; a form of joining is a subclass, and a method a subclass of that.

    It is registered as a child of the attention layer and called by hooks, so module types and parameter names of the
    base model stay as they were. Hooks are bound methods of this module, which is what makes a deep copy of the model
    independent of the original.

    Args:
        site: the attention layer and its surroundings.
    """

    method: ClassVar[str]
    # Why an adapter has no router, as a sentence goes on about the method.
    unrouted: ClassVar[str] = "has no router"
    # What it is to the model, in the words of a refusal to merge.
    joins_as: ClassVar[str] = "its prompts are extra attention rows"
    # The attribute under which what it hands on lies on tensors.
    note_name: ClassVar[str] = "_promptmoe_note"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        # By adapter, of the last forward; of a generation, of all its forwards so far.
        self.last_routing: dict[str, list[RoutingRecord]] = {}
        self.observers: list[Observer] = []
        self.grids: GridBook | None = None
        self.calls = CallBook()  # the model's own, once it knows of the layer
        self.shared: tuple[SharedLayer, ...] = ()  # a tuple, so that the root's module is no child of this one
        self.notes = Notes(self.note_name)
        self._handles: list[Any] = []

    # -- what a form defines ------------------------------------------------------------------------------------------

    @abstractmethod
    def hook(self) -> list[Any]:
        """Register the hooks by which prompts join, and return their handles."""

    def unhook(self) -> None:
        """Take the hooks away again, and what else `hook` has opened."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def adapters_of(self, call: PromptCall | None) -> list[str]:
        """The adapters that work in a forward: those that its samples are named with, or else the active ones."""
        if call is None or call.names is None or self.disable_adapters:
            return self.working_adapters()
        return [name for name in dict.fromkeys(call.names) if name in self.prompt_config]

    # -- what a method defines ----------------------------------------------------------------------------------------

    def has_router(self, adapter: str) -> bool:
        """Whether anything is chosen in this layer."""
        return False

    def needs_call(self, adapter: str) -> bool:
        """Whether the layer cannot work without the base model's `PromptCall` in the current mode."""
        return False

    def reads_query(self, adapter: str) -> bool:
        """Whether the layer's router pools the input of a causal language model and so must not see answers."""
        return False

    def pools_rows(self, adapter: str) -> bool:
        """Whether the layer's router reads a whole row, which then must hold one sample only."""
        return False

    def needs_patches(self, adapter: str) -> bool:
        """Whether the adapter works on all patches of an image, in whatever shape."""
        return self.uses_grid(adapter)

    def uses_grid(self, adapter: str) -> bool:
        """Whether rows and columns of the patch grid matter to the adapter."""
        return False

    def adds_losses(self, adapter: str) -> bool:
        """Whether the layer adds auxiliary losses to forwards of the current mode."""
        return False

    def leaves_word(self, adapter: str) -> bool:
        """Whether the layer leaves word of what it saw, in forwards of the current mode, for the method to act on."""
        return False

    def meet(self, layers: list[Any]) -> None:
        """Hear of all layers of the model, this one among them; called after each injection."""

    @classmethod
    def before_training(cls, layers: list[Any]) -> None:
        """What a method does with its layers before a forward in which they leave word."""

    @classmethod
    def after_training(cls, layers: list[Any]) -> None:
        """What a method does with its layers after such a forward, on all processes alike."""

    def settle(self) -> None:
        """Let what training has left pending come into force; called when the model goes into evaluation."""

    def wants_shared(self, adapter: str) -> bool:
        """Whether the layer takes part in what the method's layers share."""
        return False

    # -- PEFT's layer contract ----------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        return self.site.attention

    # -- in and out of the model --------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Become a child of the attention layer, and join."""
        self.site.attention.add_module(PROMPT_CHILD, self)
        self._handles = self.hook()

    def detach(self) -> None:
        """Leave the attention layer as it was before `attach`."""
        self.unhook()
        if getattr(self.site.attention, PROMPT_CHILD, None) is self:
            delattr(self.site.attention, PROMPT_CHILD)

    def note_step(self, adapter: str, before: list[RoutingRecord]) -> None:
        """Put the records of a generation's earlier steps in front of what `note` has just kept."""
        steps = [*before, *self.last_routing[adapter]]
        self.last_routing[adapter] = joined(steps) if len(steps) > STEPS else steps

    def note(self, adapter: str, gates: Tensor | Chosen, real: Tensor | None) -> None:
        """Keep what a router chose, for whoever asks after the forward, and tell those who listen."""
        record = RoutingRecord(gates.detach(), real, self.training)
        self.last_routing[adapter] = [record]
        for observer in self.observers:
            observer(self.site.name, adapter, record)


def no_call(attention: nn.Module) -> str:
    return (
        f"{type(attention).__name__} was called outside a forward of the model that holds its block, or is run again "
        "by checkpointing in a model that does not pass keyword arguments on. So its prompt layer cannot learn which "
        "tokens belong to the query or keep a router's centre. Call the model or its encoder and not its blocks, do "
        "not checkpoint, or use routing='token' (causal models) and router_centering=False."
    )
