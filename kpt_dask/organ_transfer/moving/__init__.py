"""Modes `organ`, `affine` and `across`: whole organs are moved by matches (eqs. 8 to 11).

In: matches and organ strips. Out: filled slabs of the probability volume.
`plan` turns matches into moves, `schedule` distributes slabs, `kernels` sum the organs.
Must not import `warping`.
"""
