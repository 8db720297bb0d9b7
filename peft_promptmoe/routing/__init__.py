# SPDX-License-Identifier: Apache-2.0
"""Who chooses: router mathematics, the balance loss and its way to the optimiser, the record."""
