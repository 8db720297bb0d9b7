# SPDX-License-Identifier: Apache-2.0
"""What people look at: reports of routing, the recorder, the callback."""
