"""Random events in random order, the library beside plain torch; and processes that are killed."""
