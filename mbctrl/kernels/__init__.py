"""Rollouts at the machine's limit: a step and its cost, traced to scalar expressions and lowered to machine code."""
