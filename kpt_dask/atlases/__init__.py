"""Annotated scan to atlas: the computations before an atlas is stored.

In: a scan with its label map. Out: an atlas in a store: image, labels, keypoints, organs.
`add` does it for one scan or a folder; `profiles` measures the organs.
Must not import matching or the transfer.
"""
