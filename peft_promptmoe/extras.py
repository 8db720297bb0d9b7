# SPDX-License-Identifier: Apache-2.0
"""Optional dependencies, and the error that names the missing extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Name the extra to install where an import within the block fails.

    Args:
        name: of the extra in this package's metadata.
        what: needs it, as the subject of a sentence.

    Raises:
        ModuleNotFoundError: the package that is missing is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is not installed: pip install 'peft-promptmoe[{name}]'.",
            name=error.name,
        ) from error
