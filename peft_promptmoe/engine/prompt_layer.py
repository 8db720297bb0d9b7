# SPDX-License-Identifier: Apache-2.0
"""The prompt layer: a child of one frozen attention layer that holds its prompts, whatever form they join in."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD, AdapterState, SharedLayer
from ..models.sites import Site
from ..routing.prompt_call import CallBook
from ..routing.record import Chosen, Observer, RoutingRecord
from .grid_book import GridBook

PROMPT_CALL = "promptmoe_call"


class PromptLayer(AdapterState):
    """Prompts of one attention layer; a form of joining is a subclass, and a method a subclass of that.

    It is registered as a child of the attention layer and called by hooks, so module types and parameter names of the
    base model stay as they were. Hooks are bound methods of this module, which is what makes a deep copy of the model
    independent of the original.

    Args:
        site: the attention layer and its surroundings.
    """

    method: ClassVar[str]

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.last_routing: dict[str, RoutingRecord] = {}
        self.observers: list[Observer] = []
        self.grids: GridBook | None = None
        self.calls = CallBook()  # the model's own, once it knows of the layer
        self.shared: tuple[SharedLayer, ...] = ()  # a tuple, so that the root's module is no child of this one
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

    def uses_grid(self, adapter: str) -> bool:
        """Whether the adapter's rows are made from the patch grid."""
        return False

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

    def note(self, adapter: str, gates: Tensor | Chosen, real: Tensor | None) -> None:
        """Keep what a router chose, for whoever asks after the forward, and tell those who listen."""
        record = RoutingRecord(gates.detach() if isinstance(gates, Tensor) else gates, real, self.training)
        self.last_routing[adapter] = record
        for observer in self.observers:
            observer(self.site.name, adapter, record)
