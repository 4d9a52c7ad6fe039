"""Where the processes of a run are placed, and who ends or restarts them. Imports no torch."""
