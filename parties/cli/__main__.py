"""``python -m parties.cli`` is ``unseen``."""

from parties.cli.main import app_main

app_main()
