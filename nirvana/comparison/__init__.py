"""Criteria side by side on the user's own model: same data, same kept parameters, each by its own rule and by one."""

from nirvana.comparison.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
