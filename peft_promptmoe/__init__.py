# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-prompt-experts tuners for Hugging Face PEFT. Importing this package registers them."""

from .callback import RoutingCallback
from .mept import MEPTConfig, MEPTModel
from .report import RoutingReport, record_routing, routing_report
from .vapt import VAPTConfig, VAPTModel

__version__ = "0.1.0"

__all__ = [
    "MEPTConfig",
    "MEPTModel",
    "RoutingCallback",
    "RoutingReport",
    "VAPTConfig",
    "VAPTModel",
    "record_routing",
    "routing_report",
]
