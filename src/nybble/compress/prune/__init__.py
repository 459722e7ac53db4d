"""Pruning: weights set to zero, or layers, neurons and heads taken out."""
