"""The HTTP server for a published tree."""
