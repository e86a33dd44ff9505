"""Timing programs against each other, on even terms, and the one answer that follows."""
