"""The models of sentence-transformers: the only folder that knows their modules."""
