"""Outputs of a run: written whole or not at all, and never over the user's files.

`places` checks the targets before any work, `contents` tells outputs of this program from others;
`partial` makes temporary names and finds leftovers of killed runs; `commit` moves complete outputs
to their targets, `object_store` uploads them; `interruption` delays signals.
"""
