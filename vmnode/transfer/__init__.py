"""From a base image to a guest's disk: parse -> allow -> create -> report."""
