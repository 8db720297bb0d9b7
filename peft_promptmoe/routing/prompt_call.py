# SPDX-License-Identifier: Apache-2.0
"""State of one forward that the base model's hooks pass to the prompt layers."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class GivenQuery:
    """The query of rows as a user has said it.

    Args:
        tokens: of each row, the first that are its query, padding not counted: a number, or (B,) one for each row;
            None for all.
    """

    def __init__(self, tokens: int | Tensor | None) -> None:
        self.tokens = tokens

    def of(self, x: Tensor, real: Tensor | None) -> Tensor | None:
        """(B or 1, T) the tokens of `x` (B, T, D) that are the query, of those that are `real`; None for all."""
        if self.tokens is None:
            return real
        if real is None:
            real = torch.ones_like(x[:1, :, 0], dtype=torch.bool)
        tokens = self.tokens
        if isinstance(tokens, Tensor):
            if tokens.shape[0] not in (1, x.shape[0]):
                raise ValueError(
                    f"given_query was given the lengths of {tokens.shape[0]} queries, and this batch has {x.shape[0]} "
                    "rows. Give one number for all, or one for each row."
                )
            tokens = tokens.to(x.device)[:, None]
        return real & (real.cumsum(dim=1) <= tokens)


class PromptCall:
    """What one forward of the base model tells its prompt layers; it travels through the model's keyword arguments.

    So it is there again when a checkpointed block is recomputed, in whatever thread, and two forwards never share one.

    Attributes:
        asks: whether any layer cannot work without this.
        reads_query, pools_rows: whether any layer's router reads a query, or a whole row of text.
        pools_causal: whether one that reads a whole row is in a causal layer.
        learns: whether a gradient is asked for; checkpointing switches it off for the layers.
        within: what is being called, from the outside in.
        given: the query as a user has said it; None if none has.
        names: of the adapter of each sample, where several share a batch; None where the active ones are all samples'.
        query: (B or 1, T) the tokens that routers of a causal language model may read; None while nobody knows.
        adds_losses: whether any layer is to add auxiliary losses.
        leaves_word: whether any layer leaves word of what it saw, for its method to act on when the forward is over.
        losses: auxiliary losses to report, detached, by path of the attention layer, adapter and name.
        loss_gradient: gradient of the model's loss, known once its backward pass has begun.
        by_hand: whether that is of the auxiliary losses themselves, which somebody has added to a loss of his own.
        total: sum of the weighted auxiliary losses, detached; None without.
        terms: auxiliary losses with their graph, for compiled code (see `carry_loss`), and
        added: whether they are in a loss by now.
        centers: router centres as this forward's first pass saw them, by layer and adapter.
        cached: whether the caller brought a cache, as generation does, whose texts are all query. Models make one of
            their own otherwise.
        warned: whether somebody was told that routers read the whole row.
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
        """Whether it is known what routers of a causal language model may read."""
        return self.given is not None or self.query is not None

    def readable(self, x: Tensor, real: Tensor | None) -> Tensor | None:
        """The tokens that a router of a causal language model may read.

        Args:
            x: (B, T, D) the layer's input.
            real: (B, T) which tokens are no padding; None for all.

        Returns:
            (B or 1, T); None for all.

        Raises:
            ValueError: the query was learnt from other tokens than the layer's.
        """
        if self.given is not None:
            return self.given.of(x, real)
        if self.query is None:
            return real
        if self.query.shape[1] != x.shape[1]:
            raise ValueError(
                f"The labels (or the input ids) are of {self.query.shape[1]} tokens and this layer sees {x.shape[1]}, "
                "so routing='sample' cannot tell which of them are the query. Say how many by "
                "peft_promptmoe.given_query, or use routing='token'."
            )
        return self.query if real is None else real & self.query


class CallBook:
    """The forwards of one base model that are under way, and the queries that users have given, by thread.

    A block that re-entrant checkpointing runs again in a backward pass is in no forward. Its call is that of the loss
    which this backward pass has come through last.
    """

    def __init__(self) -> None:
        self._calls: dict[int, PromptCall] = {}
        # By number of the backward pass, and by thread for those that run within another; graphs keep them alive.
        self._differentiated: WeakValueDictionary[int, PromptCall] = WeakValueDictionary()
        self._recomputed: WeakValueDictionary[int, PromptCall] = WeakValueDictionary()
        self._given: dict[int, GivenQuery] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._last: dict[int, PromptCall] = {}

    @property
    def last(self) -> PromptCall | None:
        """Of this thread's last forward that asked for gradients, if it had auxiliary losses.

        Those of a reference model, with adapters off and without gradients, may come in between.
        """
        return self._last.get(this_thread())

    @property
    def call(self) -> PromptCall | None:
        """Of the forward that this thread is in; None outside, as in a block that is run again."""
        if torch.compiler.is_compiling():  # what is around it may not be compiled
            return next(iter(self._calls.values())) if len(self._calls) == 1 else None
        return self._calls.get(this_thread())

    def begin(self) -> PromptCall:
        """The call of a forward that begins in this thread."""
        compiled = torch.compiler.is_compiling()  # it cannot ask for the thread
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
        """Forget a call whose forward is over."""
        if self.call is call:
            del self._calls[this_thread()]
        if call.total is not None and call.learns and not torch.compiler.is_compiling():
            self._last[this_thread()] = call

    def differentiate(self, call: PromptCall) -> None:
        """Note that the running backward pass has come to the loss of a call."""
        self._differentiated[torch._C._current_graph_task_id()] = call

    def recompute(self) -> PromptCall | None:
        """The call of a block that is run again in a backward pass; None outside, or without the model's loss."""
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        if (call := self._differentiated.get(task)) is not None:
            self._recomputed[this_thread()] = call
            return call
        return self._recomputed.get(this_thread())  # checkpointing within checkpointing

    def give(self, query: GivenQuery | None) -> GivenQuery | None:
        """Let a query be that of all rows in this thread from now on, and return the one before; None for none."""
        before = self._given.pop(this_thread(), None)
        if query is not None:
            self._given[this_thread()] = query
        return before

    def mix(self, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Let the samples of this thread's batches have the adapters of these names, and return those before."""
        before = self._names.pop(this_thread(), None)
        if names is not None:
            self._names[this_thread()] = names
        return before

    def __deepcopy__(self, memo: dict[int, Any]) -> CallBook:
        return CallBook()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallBook, ()


def this_thread() -> int:
    """Number of the thread; 0 in compiled code."""
    # Compiled code cannot ask, and is one forward from end to end.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
