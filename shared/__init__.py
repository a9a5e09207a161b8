"""The one package that every notebook of the course imports. Floors and contracts: CONTRIBUTING.md."""

__version__ = "0.1.0"
