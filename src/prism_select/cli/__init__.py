"""Command line: options → config → api → lines on a terminal."""
