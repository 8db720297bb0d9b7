# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-prompt-experts tuners for Hugging Face PEFT. Importing this package registers them."""

from .mept import MEPTConfig, MEPTModel

__version__ = "0.1.0"

__all__ = ["MEPTConfig", "MEPTModel"]
