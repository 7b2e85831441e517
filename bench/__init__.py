"""How fast the project is, side by side with what a plain implementation of the same science does."""
