"""How much dependence groups of channels keep, and whether their masses predict ablations."""
