# SPDX-License-Identifier: Apache-2.0
"""What is known of base models: attention layers and what surrounds them, and how to read a call."""
