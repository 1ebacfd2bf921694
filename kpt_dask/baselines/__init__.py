"""Baselines: what registering every atlas to the scan gives, and how long it takes.

`syn` registers an atlas, `fusion` makes one label map of the labels of all.
"""
