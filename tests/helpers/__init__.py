"""What several test files share and no fixture can hold: tests/ is on the path of pytest and of scripts it starts."""
