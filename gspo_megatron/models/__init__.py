"""What a model family is: names, shapes, layouts. Imports no torch."""
