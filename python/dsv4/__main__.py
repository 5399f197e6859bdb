"""`python -m dsv4`: the command line where no script is installed."""

from dsv4.cli import main

raise SystemExit(main())
