"""System identification: from logs to parameters with uncertainties."""
