"""Tombola: image classification by a fresh random ensemble of adversarially robust lottery tickets."""
