"""Judging trained models."""
