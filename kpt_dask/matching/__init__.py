"""Keypoints to matches, votes and displacement fields (eqs. 2 to 7).

In: keypoints of a scan and of atlases. Out: matches, votes. Knows no voxels.
"""
