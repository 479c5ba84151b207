"""What runs once per element: update kernels by language, installed as ``clr_optim.kernels``."""
