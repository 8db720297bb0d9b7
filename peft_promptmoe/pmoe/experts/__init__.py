# SPDX-License-Identifier: Apache-2.0
"""Frozen models beside the base model: what a config says of them, where they come from, how they are read."""
