"""One window, from its rows to its combined gradient: exchange, Gram, solve, combine. Knows rows and ranks, and no
framework."""
