"""Every measured figure in README.md and bench/README.md, made from the JSON files in bench/results."""
