"""Training: recipes, batches by sample number, Lightning, checkpoints that resume to the bit.

Iterations, not epochs, are counted, as the papers do.  Sample number n is a pure function of the
seed and n, and iteration i takes the samples from i * (samples of an iteration) on.  So a run that
was killed and resumed sees what it would have seen, and so do two devices that share a batch.
"""
