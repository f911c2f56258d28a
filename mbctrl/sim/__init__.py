"""Simulated robots: MuJoCo and dm_control behind the driver contract, and what a run is judged by."""
