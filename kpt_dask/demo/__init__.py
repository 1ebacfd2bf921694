"""The demo: phantoms, a run of the whole way, a picture.

In: a folder. Out: a store of phantoms, a segmented phantom, its Dice and a picture of it.
`run` is the demo, `phantom` makes the bodies.
Must not import the command line; it uses public functions as a user would.
"""
