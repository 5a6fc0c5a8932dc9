"""How a learnt map is used: plans, samplers, inversion, editing."""
