"""Fold plans: the fold of an architecture as plain data, made once, applied to any model of that architecture."""
