"""Speculation: where guesses come from, when they pay, and what became of them."""
