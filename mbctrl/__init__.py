"""Model-based control of robot arms: run, calibrate and deploy sampling MPC."""

__version__ = "0.1.0"
