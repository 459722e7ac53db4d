"""nybble: takes a language model from checkpoint to endpoint.

Importing the package does nothing but give a name: every part is imported where it is used, so that a program that only
wants the version, or `--help`, does not pay for numpy or the native core.
"""

# The same as in pyproject.toml, which a test checks; to look it up would cost 40 ms at each start.
__version__ = "0.1.0"
