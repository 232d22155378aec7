"""One file for each third-party family of attention modules."""
