"""One program for each tool. It runs in the tool's own environment, which its first lines describe."""
