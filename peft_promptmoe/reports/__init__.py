# SPDX-License-Identifier: Apache-2.0
"""Reports on routing and assignment, the routing recorder, Trainer callbacks and pictures."""
