"""Benches: every number in the README, by one command each."""
