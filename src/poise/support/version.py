"""The version of the package, which pyproject.toml reads here: a source folder has no metadata to ask."""

__version__ = "0.1.0"
