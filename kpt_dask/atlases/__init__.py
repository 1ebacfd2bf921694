"""Annotated scan to atlas: what is computed before an atlas is stored.

In: a scan with its label map. Out: an atlas in the store.
"""
