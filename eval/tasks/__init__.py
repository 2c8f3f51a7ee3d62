"""Tasks of our own: definitions, made documents, requests, metrics, records."""
