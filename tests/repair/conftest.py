"""Fixtures that audits and repairs share."""

from audited import base, made, request_of

__all__ = ["base", "made", "request_of"]
