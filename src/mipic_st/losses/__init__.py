"""The training loss, its terms, and what the trainer needs in addition."""
