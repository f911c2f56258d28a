"""The command line, and what wires planner, loop and robot together."""
