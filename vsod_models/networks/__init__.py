"""The networks, one file per model, to be read beside its paper; and how models are saved."""
