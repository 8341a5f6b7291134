"""The networks: one file a model, to be read beside its paper, and how models are saved."""
