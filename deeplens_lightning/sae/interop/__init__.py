"""Doors to other libraries' dictionaries: read theirs, write ours so that they can."""
