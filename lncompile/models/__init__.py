"""Models by name, and what is needed to call one."""
