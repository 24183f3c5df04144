"""vmnode: the administration daemon of a KVM worker node in an HTCondor pool."""

__version__ = "0.1.0"
