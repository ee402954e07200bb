"""The ops: one file each, found by its name; each holds the op's whole contract and no kernel."""
