"""The command line: `kpt` and what `scripts/submit_slurm` runs.

Turns words into calls and errors into sentences; computes nothing.
"""
