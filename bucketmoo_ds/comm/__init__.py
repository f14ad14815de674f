"""What goes between ranks, and in which order streams do it. Knows process groups and bytes; nothing of frameworks,
rules or languages."""
