"""What a run writes: where it may, whole or not at all, and never over what is the user's.

`places` says where, before any work; `partial` gives names to write to and finds what killed
runs left; `commit` puts complete outputs in their places; `interruption` lets signals wait.
"""
