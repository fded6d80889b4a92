"""Jobs: submit, read, list, cancel."""
