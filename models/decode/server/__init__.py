"""A server of a model in the form of OpenAI's API."""
