"""Requests in, tokens out. Import from the modules: nothing is loaded that a caller does not use."""
