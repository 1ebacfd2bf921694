"""Modes `organ`, `affine` and `across`: whole organs are moved by matches (eqs. 8 to 11).

In: matches and organ strips. Out: filled slabs. Knows nothing of `warping`.
"""
