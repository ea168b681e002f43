"""How much dependence groups of channels retain, and whether their masses predict ablations."""
