"""Dependence that groups of channels preserve, and agreement of their masses with ablations."""
