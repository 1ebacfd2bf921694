"""Dense refinement: each atlas's field is corrected near organs, where intensities tell.

In: the scan's volume, atlases, their displacement fields, and where organs may be. Out: for each
atlas its map on one lattice, and how well the atlas then agrees with the scan. Knows no votes.
"""
