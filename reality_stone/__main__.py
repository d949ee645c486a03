"""python -m reality_stone."""

from .cli import main

raise SystemExit(main())
