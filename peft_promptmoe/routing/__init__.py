# SPDX-License-Identifier: Apache-2.0
"""Mathematics of routers, auxiliary losses, and records of what routers chose."""
