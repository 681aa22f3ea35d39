"""Kills and power cuts: what a run leaves then, and what the next one makes of it."""
