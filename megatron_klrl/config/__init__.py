"""Recipes: typed sections, loading, rules, model folders. Imports no torch, so a login node can validate."""
