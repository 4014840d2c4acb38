"""Attacks a library as its critics would, checks the attacks, and says what the figures are worth."""
