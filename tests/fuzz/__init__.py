"""Hostile inputs, made from seeds: every one must be accepted or refused in a sentence. ``make fuzz`` runs them."""
