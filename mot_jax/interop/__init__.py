"""Models of other projects, and other projects' programs."""
