# SPDX-License-Identifier: Apache-2.0
"""Reports of routing and assignment, the recorder, callbacks, pictures."""
