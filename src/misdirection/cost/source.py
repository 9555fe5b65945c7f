"""The model that is planned for, without its weights."""

from misdirection.models.weightless import EstimatingTokenizer as RoughTokenizer
from misdirection.models.weightless import Structure as Source
from misdirection.models.weightless import read_structure as read_source

__all__ = ["RoughTokenizer", "Source", "read_source"]
