"""Random events for the library beside plain torch, and processes that are killed."""
