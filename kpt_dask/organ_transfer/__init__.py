"""Matches to probabilities and labels (eqs. 8 to 11).

In: matches, votes, and the organs of atlases. Out: probability volume, label map, measures.
`modes` is the door; `moving` and `warping` fill the volume, `decision` labels it.
Must not import the segmentation or the command line.
"""
