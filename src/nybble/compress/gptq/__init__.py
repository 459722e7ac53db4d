"""GPTQ: rounding that makes up for its own errors. Frantar et al. 2022, arXiv 2210.17323."""
