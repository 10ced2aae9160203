"""The model folder: its card, its checks, its networks. Importing this package does not load torch.

Nothing here ever needs the network, so the Hugging Face libraries are told so before they are imported;
somebody who wants them on line sets ``HF_HUB_OFFLINE=0`` beforehand.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
