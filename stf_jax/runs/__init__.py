"""The files and signals of a run: lock, events, metrics, profiles, status."""
