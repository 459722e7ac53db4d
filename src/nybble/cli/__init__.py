"""The command line: argument parsing and what is shown, nothing else."""
