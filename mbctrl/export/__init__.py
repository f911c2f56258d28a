"""From a controller to a bundle: one planning step as ONNX graphs and as a traced rollout, with all a robot's computer needs."""
