"""Internals of peft."""

from __future__ import annotations

from peft.utils.other import get_pattern_key

__all__ = ["get_pattern_key"]
