"""Utilities without project-specific code: reading, writing, command lines, memory and cores."""
