"""Scaled dot product attention with its forward-mode tangent."""
