# SPDX-License-Identifier: Apache-2.0
"""What one forward of the base model tells its prompt layers, and where they find it."""

from __future__ import annotations

import threading
from typing import Any

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
        reads_query, pools_rows: whether any layer's router reads a query, or a whole row.
        learns: whether a gradient is asked for; checkpointing switches it off for the layers.
        within: what is being called, from the outside in.
        given: the query as a user has said it; None if none has.
        query: (B or 1, T) the tokens that routers of a causal language model may read; None while nobody knows.
        leaves_word: whether any layer leaves word of what it saw, for its method to act on when the forward is over.
        losses: auxiliary losses to report, detached, by path of the attention layer, adapter and name.
        loss_gradient: gradient of the model's loss, known once its backward pass has begun.
        by_hand: whether that is of the auxiliary losses themselves, which somebody has added to a loss of his own.
        total: sum of the weighted auxiliary losses, detached; None without.
        terms: auxiliary losses with their graph, for compiled code (see `carry_loss`).
        centers: router centres as this forward's first pass saw them, by layer and adapter.
        cached: whether the caller brought a cache, as generation does, whose texts are all query. Models make one of
            their own otherwise.
        warned: whether somebody was told that routers read the whole row.
    """

    def __init__(self, given: GivenQuery | None = None) -> None:
        self.asks = self.reads_query = self.pools_rows = self.leaves_word = False
        self.learns = torch.is_grad_enabled()
        self.within: list[Any] = []
        self.given = given
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

    Attributes:
        loss_gradient: of the loss whose backward pass has begun last. A block that re-entrant checkpointing runs again
            in a backward pass finds no call, and belongs to the forward of that loss. None since a forward began.
    """

    def __init__(self) -> None:
        self.loss_gradient: Tensor | None = None
        self._calls: dict[int, PromptCall] = {}
        self._given: dict[int, GivenQuery] = {}
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
        call = PromptCall(next(iter(self._given.values()), None) if compiled else self._given.get(this_thread()))
        self._calls[this_thread()] = call
        self.loss_gradient = None
        if call.learns:
            self._last.pop(this_thread(), None)
        return call

    def end(self, call: PromptCall) -> None:
        """Forget a call whose forward is over."""
        if self.call is call:
            del self._calls[this_thread()]
        if call.total is not None and call.learns and not torch.compiler.is_compiling():
            self._last[this_thread()] = call

    def give(self, query: GivenQuery | None) -> GivenQuery | None:
        """Let a query be that of all rows in this thread from now on, and return the one before; None for none."""
        before = self._given.pop(this_thread(), None)
        if query is not None:
            self._given[this_thread()] = query
        return before

    def __deepcopy__(self, memo: dict[int, Any]) -> CallBook:
        return CallBook()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallBook, ()


def this_thread() -> int:
    """Number of the thread; 0 in compiled code."""
    # Compiled code cannot ask, and is one forward from end to end.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
