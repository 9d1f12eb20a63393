"""`python -m reprdpo.cli`, the same as the `reprdpo` command."""

import sys

from reprdpo.cli import main

sys.exit(main())
