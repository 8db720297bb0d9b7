# SPDX-License-Identifier: Apache-2.0
"""Which architectures prompts can join, and whether the result is right: tiny models, their inputs, the checks."""
