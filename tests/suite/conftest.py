"""Fixtures that audits share."""

from audited import base, made

__all__ = ["base", "made"]
