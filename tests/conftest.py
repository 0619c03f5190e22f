"""Triton runs in its interpreter in these tests: the flag must stand before anything imports Triton (transformers does).

Tests that need a GPU run in a process of their own, with TRITON_INTERPRET=0.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
