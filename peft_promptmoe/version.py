# SPDX-License-Identifier: Apache-2.0
"""The version, in its one place: the package, both archives and model cards read it here."""

__version__ = "0.1.0"
