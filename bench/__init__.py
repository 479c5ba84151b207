"""Measurements of the library, installed as ``clr_optim.bench``."""
