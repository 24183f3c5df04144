"""One thin module per executable: parse the arguments, call one function, exit."""
