# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of adapters: checks of files, roll-back, adapter names, the model card."""
