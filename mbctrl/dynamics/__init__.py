"""Models of the arm: analytic rigid-body dynamics in torch, Pinocchio as the reference, MuJoCo as a model."""
