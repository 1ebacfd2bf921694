"""Bytes by key: a folder or an object store, guards, the cache.

Knows no array.
"""
