"""`puna convert`: models into Hugging Face releases, and weights of others into runs of ours."""
