# SPDX-License-Identifier: Apache-2.0
"""Routers: their mathematics, auxiliary losses, and the record of what was chosen."""
