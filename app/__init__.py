"""The service: HTTP, records, queue, storage, command line. Never imports torch."""
