"""The page and the picture of a segmentation, for a person who looks at it.

In: the OME-Zarr output of a segmentation, and the store of its atlases. Out: one HTML file that
needs no network, and one PNG. `findings` reads what the output holds, `display` the voxels that
are shown; `slices`, `turntable`, `gallery` and `overlay` make pictures; `page` puts them together.
"""
