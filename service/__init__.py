"""Serves a ticket library: a fresh random ensemble for every image, on a public and an admin plane."""
