"""What is cut, and how: decided before anything is touched, from data alone. Imports no torch."""
