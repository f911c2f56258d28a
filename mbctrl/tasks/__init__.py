"""Tasks: sums of named cost terms, written once for torch tensors and for traced expressions."""
