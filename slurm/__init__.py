"""Runs on a Slurm cluster: one run, arrays of runs, their state. Starts scripts, imports none."""
