"""Models in the form that servers read."""
