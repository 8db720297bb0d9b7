# SPDX-License-Identifier: Apache-2.0
"""Saving and loading adapters: checks, roll-back, names, the model card."""
