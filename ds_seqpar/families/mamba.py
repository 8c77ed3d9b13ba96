"""Mamba: every rank repeats the mixers; their scans read states that are made of all channels."""

STYLES = {"layers.*.mixer": "whole"}
