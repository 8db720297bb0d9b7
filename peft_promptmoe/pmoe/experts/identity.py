# SPDX-License-Identifier: Apache-2.0
"""Checks whether an expert is the one that an adapter was trained with."""

from __future__ import annotations

import warnings

from .records import ExpertRecord
from .sources import HAND_OVER

# Fields of a record that must be equal when an adapter is loaded.
COMPARED = ("library", "type", "width", "depth", "patch", "size")


def is_told_apart(record: ExpertRecord) -> bool:
    """Whether the record has a hash that identifies this expert among others of its type."""
    return record.weights is not None or record.quantised is not None


def compare(found: ExpertRecord, stored: ExpertRecord) -> None:
    """Raise ValueError if an expert has another type or size than the one in the adapter's config."""
    for field in COMPARED:
        new, old = getattr(found, field), getattr(stored, field)
        if new != old:
            raise ValueError(
                f"Expert {found.name!r} is not the one that the adapter was trained with, {stored.name!r}: its "
                f"{field} is {new} but was {old}. Use the expert that it was trained with."
            )


def check_weights(found: ExpertRecord, stored: ExpertRecord) -> None:
    """Raise ValueError if an expert has other weights than the adapter was trained with.

    If the weights cannot be compared, there is a warning instead.
    """
    if found.weights is None or stored.weights is None:
        if found.quantised is None or found.quantised != stored.quantised:
            warnings.warn(
                f"The weights of expert {found.name!r} are quantised or spread over processes, so they cannot be "
                f"compared with those of {stored.name!r} that the adapter was trained with.",
                stacklevel=2,
            )
    elif found.weights != stored.weights:
        raise ValueError(
            f"Expert {found.name!r} is not the one that the adapter was trained with, {stored.name!r}: its weights "
            f"differ (hash {found.weights[:12]}, recorded {stored.weights[:12]}; a cast to float16 also changes "
            f"them). Use the weights that it was trained with: {HAND_OVER}."
        )
