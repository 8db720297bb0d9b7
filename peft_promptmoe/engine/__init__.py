# SPDX-License-Identifier: Apache-2.0
"""The engine: adds prompts to the attention layers and blocks of a frozen model."""
