"""The process that started this one, read before the heavy imports: a parent that dies during them would have
been replaced already."""

from __future__ import annotations

import os

STARTED_BY = os.getppid()
