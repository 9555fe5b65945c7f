"""Fixtures that audits and repairs share."""

from audited import base, inputs_of, made, sealed, verdict

__all__ = ["base", "inputs_of", "made", "sealed", "verdict"]
