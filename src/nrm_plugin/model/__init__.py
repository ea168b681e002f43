"""The user's model: its layers, inputs and outputs, and how to run it without modifying it.

This package computes no relevance.
Imports: errors.
"""
