"""The user's model: its layers, its inputs and outputs, and its execution without changes.

This package computes no relevance.
Imports: errors.
"""
