"""What a micro-batch says about itself (language, target tokens, how its loss was normalised), and which language and
rows each slot of a window gets. Knows no gradients."""
