"""Verification: errors of every loss on the user's machine, and checks of what is promised."""
