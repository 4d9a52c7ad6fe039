"""Findings: what is wrong with a recipe, or worth a second look."""
