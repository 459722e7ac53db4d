"""Round-to-nearest: integers and 8-bit floats, each weight by itself."""
