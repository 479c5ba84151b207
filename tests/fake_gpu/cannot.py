"""Tests that the fake device cannot run, with the reason for each."""

from __future__ import annotations

__all__ = ["CANNOT"]

#: part of a test's name -> why the fake device cannot run the test
CANNOT: dict[str, str] = {}
