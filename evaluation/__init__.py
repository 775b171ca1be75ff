"""Looking at concepts: plots of what they hold and of what they do.

Knows concepts, not models; draws with Pillow alone.
"""
