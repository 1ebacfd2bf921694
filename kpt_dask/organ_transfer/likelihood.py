"""Intensity likelihood of a vote (eq. 11): exp(−d² / 2ν²), where d is the difference of HU.

Kernels compute it as a power of 2, and as 0 where it is below 10⁻⁷.
"""

VANISHING = 6.0
"""Difference of HU, in units of ν, from which on the likelihood is 0."""
