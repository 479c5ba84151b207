"""Faults that only several streams, or many captures, bring to light."""
