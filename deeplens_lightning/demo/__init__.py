"""The embedded model and its text: everything a newcomer needs, without a hub."""
