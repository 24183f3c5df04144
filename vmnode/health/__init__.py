"""Can this node run a virtual machine? Observe, decide, publish."""
