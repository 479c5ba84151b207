"""The benchmarks, installed as ``clr_optim.bench``."""
