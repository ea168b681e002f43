"""Trained networks and real photographs, both from ordinary packages, and the questions asked of explanations."""
