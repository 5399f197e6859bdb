"""`python -m dsv4.cli`."""

from __future__ import annotations

import sys

from dsv4.cli import main

sys.exit(main())
