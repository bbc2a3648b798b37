"""The version of the package. pyproject.toml reads it here.

The metadata of an installed package are absent when it runs from a source folder.
"""

__version__ = "0.1.0"
