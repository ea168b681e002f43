"""Explaining picture files: pictures and models in, heat maps and numbers out. The commands of the shell use it."""
