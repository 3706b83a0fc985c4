"""The version, also that of the package (setup.cfg)."""

__version__ = "0.1.0"
