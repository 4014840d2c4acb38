"""What a stored model is, and what gives it meaning: tickets, the law that draws them, and the attacks that test them.

Imports neither training nor service. FORMAT.md describes what is on disk.
"""
