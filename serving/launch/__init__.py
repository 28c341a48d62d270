"""Starting rank processes, on this host or on joined hosts."""
