"""Which atlases resemble a scan: segments of descriptors, searched exactly or by a graph.

Derived from the store, kept in the cache of the user.
"""
