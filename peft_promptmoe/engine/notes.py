# SPDX-License-Identifier: Apache-2.0
"""Notes that one module of the base model leaves for the module that reads its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..routing.prompt_call import CallBook, PromptCall, this_thread


class Notes:
    """Notes of one kind from one module to the next, attached to the tensor between them.

    A note on a tensor cannot be read by another thread or another call. But the tensor is sometimes replaced on the
    way: by DeepSpeed ZeRO-3, FSDP around a single layer, and hooks that scale or observe. So the last note is also
    stored by thread until the reading module has run. It is valid in the same forward pass only.

    Args:
        name: name of the attribute on the tensor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._last: dict[int, tuple[PromptCall | None, Tensor, Any]] = {}

    def leave(self, carrier: Tensor, note: Any, book: CallBook) -> None:
        """Leave a note for the module that gets `carrier`, or a tensor that replaces it."""
        setattr(carrier, self.name, note)
        self._last[this_thread()] = (book.call, carrier, note)

    def on(self, carrier: Tensor) -> Any | None:
        """The note on a tensor, or None."""
        return getattr(carrier, self.name, None)

    def beside(self, carrier: Tensor, book: CallBook) -> Any | None:
        """The last note of this forward pass and thread, left on a tensor of the same shape, or None."""
        call, left_on, note = self._last.get(this_thread(), (None, None, None))
        if left_on is None or call is not book.call or left_on.shape != carrier.shape:
            return None
        return note

    def forget(self) -> None:
        """Forget the stored note: the reading module has run in this thread."""
        self._last.pop(this_thread(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Notes:
        return Notes(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Notes, (self.name,)
