"""Measure the losses' errors on the user's machine, and check every promise about them."""
