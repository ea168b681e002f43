"""Trained networks and real photographs from public packages, and the evaluation of their explanations."""
