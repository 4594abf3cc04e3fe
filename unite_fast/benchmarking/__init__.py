"""Measure how fast a recipe trains on this machine (`unite-fast bench`), and find faster settings (`tune`)."""
