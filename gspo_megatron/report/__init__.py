"""What is left of a run when it is over: the plot and the page."""
