"""The quickstart: averaging against bucket MOO on real text, from one base model, with paired seeds, in minutes."""
