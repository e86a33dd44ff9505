"""lncompile."""
