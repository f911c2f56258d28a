"""The lowest layer: errors, strict YAML, file search, robots, scenes, plans and logs (numpy and yaml only)."""
