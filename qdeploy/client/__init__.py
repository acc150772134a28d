"""The device side: fetch, verify, assemble, run, climb. Standard library and numpy at import."""
