# SPDX-License-Identifier: Apache-2.0
"""How adapters travel: what is checked when one is loaded, names, the model card."""
