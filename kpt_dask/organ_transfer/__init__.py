"""Matches to probabilities and labels (eqs. 8 to 11).

In: matches, votes, organs of atlases. Out: the probability volume, the label map, measures.
"""
