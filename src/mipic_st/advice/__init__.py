"""Which dim and precision to store, measured on a corpus."""
