"""Role three: decides. The only code that awaits, and the only code that logs."""
