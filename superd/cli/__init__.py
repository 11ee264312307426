"""The two command lines, superd(8) and superctl(1)."""
