"""AWQ: inputs that matter are scaled up before rounding. Lin et al. 2023, arXiv 2306.00978."""
