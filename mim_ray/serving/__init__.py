"""RIM and ranking over HTTP."""
