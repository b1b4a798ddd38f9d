"""What a node keeps on disk, and how it is written: whole or not at all."""
