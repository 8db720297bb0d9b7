# SPDX-License-Identifier: Apache-2.0
"""The error for a missing optional dependency. It names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Context manager: if an import in the block fails, say which extra to install.

    Args:
        name: name of the extra in this package's metadata.
        what: what needs the package; the first words of the message.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is not installed: pip install 'peft-promptmoe[{name}]'.",
            name=error.name,
        ) from error
