"""The lab: real worker nodes on one machine, for the tests, the demo and the curious.

Linux namespaces and Debian packages only; needs root. ``python -m tests.lab --help`` says what it can do by
itself, node.py is what tests use.
"""
