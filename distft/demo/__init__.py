"""What `distft demo` needs and a cluster does not: a small real model from a package, and data made on the spot."""
