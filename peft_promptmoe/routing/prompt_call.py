# SPDX-License-Identifier: Apache-2.0
"""State of one forward pass, which the base model's hooks pass to the prompt layers."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class GivenQuery:
    """The query of each row, given by the user.

    Args:
        tokens: number of query tokens at the start of each row, without padding: one number, or (B,) one per row.
            None: all tokens.
    """

    def __init__(self, tokens: int | Tensor | None) -> None:
        self.tokens = tokens

    def of(self, x: Tensor, real: Tensor | None) -> Tensor | None:
        """Which tokens of `x` (B, T, D) are the query, (B or 1, T), among the `real` ones. None: all."""
        if self.tokens is None:
            return real
        if real is None:
            real = torch.ones_like(x[:1, :, 0], dtype=torch.bool)
        tokens = self.tokens
        if isinstance(tokens, Tensor):
            if tokens.shape[0] not in (1, x.shape[0]):
                raise ValueError(
                    f"given_query got {tokens.shape[0]} numbers, but this batch has {x.shape[0]} rows. Pass one "
                    "number for all rows, or one for each row."
                )
            tokens = tokens.to(x.device)[:, None]
        return real & (real.cumsum(dim=1) <= tokens)


class PromptCall:
    """What one forward pass of the base model tells its prompt layers. It is passed as a keyword argument.

    So a checkpointed block gets it again when it is run again, in any thread, and two forward passes never share one.

    Attributes:
        asks: whether any layer cannot work without this call.
        reads_query: whether any layer's router reads a query.
        pools_rows: whether any layer's router reads a whole row of text.
        pools_causal: whether any router that reads a whole row is in a causal layer.
        learns: whether gradients are needed. (Checkpointing turns them off while it runs the layers.)
        within: the modules being called, from the outside in.
        given: the query given by the user, or None.
        names: name of each sample's adapter, if several adapters share a batch. None: the active adapters.
        query: (B or 1, T) tokens that routers of a causal language model may read. None while unknown.
        adds_losses: whether any layer adds auxiliary losses.
        leaves_word: whether any layer stores an update that its method applies after the forward pass.
        losses: auxiliary losses to report, detached, by path of the attention layer, adapter and name.
        loss_gradient: gradient of the model's loss, known once its backward pass has started.
        by_hand: whether `loss_gradient` is that of `auxiliary_loss(model)`, which the user added to another loss.
        total: sum of the weighted auxiliary losses, detached. None without any.
        terms: auxiliary losses with their graph, for compiled code (see `carry_loss`).
        added: whether `terms` were added to a loss.
        centers: router centres as first read in this forward pass, by layer and adapter.
        cached: whether the caller passed a cache, as in generation. All tokens are then query. Without one, models
            make their own.
        warned: whether the user was warned that routers read the whole row.
    """

    def __init__(self, given: GivenQuery | None = None, names: tuple[str, ...] | None = None) -> None:
        self.asks = self.reads_query = self.pools_rows = self.pools_causal = self.leaves_word = False
        self.adds_losses = self.added = False
        self.learns = torch.is_grad_enabled()
        self.within: list[Any] = []
        self.given = given
        self.names = names
        self.query: Tensor | None = None
        self.losses: dict[tuple[str, str, str], Tensor] = {}
        self.loss_gradient: Tensor | None = None
        self.by_hand = False
        self.total: Tensor | None = None
        self.terms: list[Tensor] = []
        self.centers: dict[tuple[str, str], Tensor] = {}
        self.cached = self.warned = False

    @property
    def knows_query(self) -> bool:
        """Whether the query of a causal language model is known."""
        return self.given is not None or self.query is not None

    def readable(self, x: Tensor, real: Tensor | None) -> Tensor | None:
        """The tokens that a router of a causal language model may read.

        Args:
            x: (B, T, D) the layer's input.
            real: (B, T) which tokens are not padding. None: all.

        Returns:
            (B or 1, T) boolean. None: all.

        Raises:
            ValueError: the query has another number of tokens than the layer's input.
        """
        if self.given is not None:
            return self.given.of(x, real)
        if self.query is None:
            return real
        if self.query.shape[1] != x.shape[1]:
            raise ValueError(
                f"The labels (or the input ids) have {self.query.shape[1]} tokens, but this layer sees {x.shape[1]}, "
                "so routing='sample' cannot tell which of them are the query. Give the number of query tokens with "
                "peft_promptmoe.given_query, or use routing='token'."
            )
        return self.query if real is None else real & self.query


class CallBook:
    """The running forward passes of one base model, and the queries given by users, for each thread.

    A block that re-entrant checkpointing runs again in a backward pass is outside of any forward pass. Its call is the
    one of the loss that this backward pass reached last.
    """

    def __init__(self) -> None:
        self._calls: dict[int, PromptCall] = {}
        # By number of the backward pass, and by thread for nested ones. Graphs keep the calls alive.
        self._differentiated: WeakValueDictionary[int, PromptCall] = WeakValueDictionary()
        self._recomputed: WeakValueDictionary[int, PromptCall] = WeakValueDictionary()
        self._given: dict[int, GivenQuery] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._last: dict[int, PromptCall] = {}

    @property
    def last(self) -> PromptCall | None:
        """The call of this thread's last forward pass with gradients, if it had auxiliary losses.

        Forward passes of a reference model, with adapters off and without gradients, may come in between.
        """
        return self._last.get(this_thread())

    @property
    def call(self) -> PromptCall | None:
        """The call of this thread's running forward pass. None outside, also in a block that is run again."""
        if torch.compiler.is_compiling():  # the code around it may not be compiled
            return next(iter(self._calls.values())) if len(self._calls) == 1 else None
        return self._calls.get(this_thread())

    def begin(self) -> PromptCall:
        """Start a forward pass in this thread, and return its call."""
        compiled = torch.compiler.is_compiling()  # compiled code cannot get the thread
        given, names = self._given, self._names
        if compiled:
            call = PromptCall(next(iter(given.values()), None), next(iter(names.values()), None))
        else:
            call = PromptCall(given.get(this_thread()), names.get(this_thread()))
            self._recomputed.pop(this_thread(), None)
        self._calls[this_thread()] = call
        if call.learns:
            self._last.pop(this_thread(), None)
        return call

    def end(self, call: PromptCall) -> None:
        """End the forward pass of a call."""
        if self.call is call:
            del self._calls[this_thread()]
        if call.total is not None and call.learns and not torch.compiler.is_compiling():
            self._last[this_thread()] = call

    def differentiate(self, call: PromptCall) -> None:
        """Note that the running backward pass reached the loss of a call."""
        self._differentiated[torch._C._current_graph_task_id()] = call

    def recompute(self) -> PromptCall | None:
        """The call for a block that is run again in a backward pass. None outside, or without the model's loss."""
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        if (call := self._differentiated.get(task)) is not None:
            self._recomputed[this_thread()] = call
            return call
        return self._recomputed.get(this_thread())  # nested checkpointing

    def give(self, query: GivenQuery | None) -> GivenQuery | None:
        """Set the query for this thread from now on (None: no query), and return the one before."""
        before = self._given.pop(this_thread(), None)
        if query is not None:
            self._given[this_thread()] = query
        return before

    def mix(self, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Set the adapter names of the samples in this thread's batches, and return the names before."""
        before = self._names.pop(this_thread(), None)
        if names is not None:
            self._names[this_thread()] = names
        return before

    def __deepcopy__(self, memo: dict[int, Any]) -> CallBook:
        return CallBook()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallBook, ()


def this_thread() -> int:
    """Id of the thread. 0 in compiled code."""
    # Compiled code cannot get the thread, and is always one complete forward pass.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
