"""The only package that touches the machine: small verbs, typed answers, no policy."""
