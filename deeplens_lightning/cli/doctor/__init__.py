"""`deeplens-lightning doctor`: check the promises of this package on the machine and device of its user."""
