# SPDX-License-Identifier: Apache-2.0
"""How prompts join a frozen model."""
