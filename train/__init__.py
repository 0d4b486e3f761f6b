"""Stage two: win back what the edit broke, and bring nothing back. Also home of the main command, run.py."""
