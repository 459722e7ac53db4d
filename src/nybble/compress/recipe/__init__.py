"""Recipes: several ways to make a model smaller, one after the other, and what each of them cost."""
