"""What every trainer rank runs."""
