# SPDX-License-Identifier: Apache-2.0
"""Knowledge about base models: attention layers, their surroundings, and the arguments of a call."""
