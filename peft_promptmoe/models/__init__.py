# SPDX-License-Identifier: Apache-2.0
"""What the package knows about base models: attention layers, their surroundings, and call arguments."""
