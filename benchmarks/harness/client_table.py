# SPDX-License-Identifier: Apache-2.0
"""What tests/clients found, as a table."""

from __future__ import annotations

from .markdown import table
from .reading import results


def clients() -> str:
    """One line for each check; a client whose checks have not all passed says which did not."""
    rows = []
    for client, found in sorted(results("clients").items()):
        for check in found["tests"].values():
            failed = [name or "it" for name in check["failed"]]
            verdict = f"**failed**: {', '.join(failed)}" if failed else "passed"
            rows.append([client, found["version"], check["checked"], ", ".join(check["passed"]), verdict])
    found_at_all = table(["library", "version", "what is checked", "variants", "result"], rows)
    return found_at_all.replace("---:", "---")  # words, no numbers
