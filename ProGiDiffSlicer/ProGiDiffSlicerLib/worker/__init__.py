"""The worker process, seen from inside Slicer: started, spoken to and watched without ever blocking the event loop."""

from __future__ import annotations
