"""Where credit goes wrong in a run, and what TAPO changes."""
