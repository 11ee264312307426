"""System calls: sync, one concern per file, no trio, no logging. Siblings do not import each other."""
