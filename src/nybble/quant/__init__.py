"""The one table of weight encodings, and their readable reference numerics."""
