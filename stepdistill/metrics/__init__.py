"""Scoring images: where they come from, what is measured of them, by which protocol."""
