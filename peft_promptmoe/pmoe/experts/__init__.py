# SPDX-License-Identifier: Apache-2.0
"""The further experts: their records in the config, where they are loaded from, and how they are run."""
