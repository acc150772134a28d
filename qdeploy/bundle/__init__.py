"""A ladder of nested models as bit planes on disk; FORMAT.md is the specification."""
