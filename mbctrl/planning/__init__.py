"""Sampling planners: action parametrisation x noise x update rule x model, all settings frozen, all state a value."""
