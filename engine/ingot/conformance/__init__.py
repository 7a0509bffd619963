"""Does a package answer the same wherever it is loaded? Each target is a file, or a function in one."""
