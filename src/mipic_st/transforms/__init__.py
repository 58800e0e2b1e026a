"""What is fitted on vectors: rotations, layer cuts, word weights."""
