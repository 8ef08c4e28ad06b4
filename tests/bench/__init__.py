"""Measurements of one thing each (`make bench-...`); their small versions run in the suite."""
