# SPDX-License-Identifier: Apache-2.0
"""Methods of other libraries that some of their versions refuse on some models, and how that is found out."""

from __future__ import annotations

import warnings
from collections.abc import Callable

# Where transformers calls its cache by a new name, PEFT gives BERT no prefixes, and `generate` does not see them.
MAY_BE_REFUSED = ("prefix_tuning", "prefix")
UNSEEN = "Both `past_key_values` and `cache` are set"


def refusal(method: str, work: Callable[[], object]) -> str | None:
    """Why a method that may be refused cannot do its work on a model; None if it can, and has done it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=UNSEEN)
            work()
    except (ValueError, FutureWarning) as error:
        if method not in MAY_BE_REFUSED:
            raise
        # The message goes on with what the arguments are.
        return str(error).split(". ", maxsplit=1)[0]
    return None
