"""Checks of a store's annotations: each atlas against what the other atlases say of its scan.

In: a store, and ids of atlases in it. Out: findings, one sentence each; nothing is written to the
store. `prediction` segments an atlas by the others, `comparison` measures how far its own labels
agree, `spread` says what is usual, `rules` says what is not, `duplicates` finds scans that are
there twice; `schedule` does all of it, and `page` shows it.
"""
