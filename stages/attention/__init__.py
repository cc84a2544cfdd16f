"""Attention: one function, several implementations, and which of them is right and fastest here.

`attention` computes it; `stages/attention/backends.py` has the implementations, `stages/attention/choice.py` tests and
times them.
"""

from stages.attention.backends import attention

__all__ = ["attention"]
