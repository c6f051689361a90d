"""A model with its corrections as an HTTP service: an OpenAI-compatible endpoint, and the ledger's edits over HTTP."""

from emendo.serve.app import create_app
from emendo.serve.service import Settings

__all__ = ["Settings", "create_app"]
