"""Update rules, one module each: what a planner learns from the costs of its candidates."""

RULES = {
    "random_shooting": "mbctrl.planning.rules.shooting:RandomShooting",
    "predictive_sampling": "mbctrl.planning.rules.shooting:PredictiveSampling",
    "cem": "mbctrl.planning.rules.cem:Cem",
    "icem": "mbctrl.planning.rules.icem:ICem",
    "mppi": "mbctrl.planning.rules.mppi:Mppi",
}
