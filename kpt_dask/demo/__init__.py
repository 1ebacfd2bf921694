"""The demo: phantoms, a run of the whole way, a picture.

Uses the public functions alone.
"""
