"""Mode `local`: each atlas is warped by a smooth field through its matches.

In: displacement fields and crops of atlases. Out: filled slabs. Knows nothing of `moving`.
"""
