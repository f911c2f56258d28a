"""Learning what the physics misses: transitions on disk, training of ensembles, judging of models."""
