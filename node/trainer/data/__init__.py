"""Text of this member -> tokens -> training windows."""
