"""Keypoints to matches, votes and displacement fields (eqs. 2 to 7).

In: keypoints of a scan and of atlases. Out: matches (`first_pass`), posteriors (`voting`).
`selection` chooses atlases; `second_pass` and `displacement` serve the transfer of mode local.
Must not import atlases or the transfer; it reads no voxels.
"""
