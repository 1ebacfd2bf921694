"""Mode `local`: each atlas is warped by a smooth field through its matches.

In: displacement fields and crops of atlases. Out: filled blocks of the probability volume.
Every voxel asks the atlases that the fields bring there; their votes are averaged over cells.
Must not import `moving`.
"""
