"""The command line: `kpt`, and what `scripts/submit_slurm` runs.

In: arguments. Out: calls of the public functions, lines for a person, exit codes.
`main` has the commands, `atlas` those on a store, other modules that of their name; `common` has
what they share, `slurm` the jobs.
Nothing imports it; it computes nothing.
"""
