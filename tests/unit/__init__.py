"""What needs nothing but Python: decisions, parsers, formats, the command line."""
