"""A model with its corrections as an HTTP service: an OpenAI-compatible endpoint, and the ledger's edits over HTTP."""

from emendo.serve.app import create_app
from emendo.serve.engine import Bounds
from emendo.serve.security import Access
from emendo.serve.service import Settings

__all__ = ["Access", "Bounds", "Settings", "create_app"]
