"""What an accepted answer is, when two answers are the same, and whether a text holds one."""
