"""Files and scans: NIfTI in, label maps out, on the grid of the file.

In: paths. Out: `Scan` (lazy planes, affine) and label files. Knows no volume and no atlas.
"""
