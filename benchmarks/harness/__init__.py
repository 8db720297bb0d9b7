# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder share: models, methods, data, training, counting, timing, and files of results."""
