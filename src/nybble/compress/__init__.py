"""Makes models smaller: what is measured, decided and written when a model is quantised, converted or pruned."""
