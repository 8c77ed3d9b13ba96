"""Collectives and the autograd edges made of them. Imports torch only."""
