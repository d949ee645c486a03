"""Optimisers of what no gradient reaches: the codes."""

from .code_descent import CodeDescent, CodeStep

__all__ = ["CodeDescent", "CodeStep"]
