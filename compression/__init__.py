"""Numbers only: 8-bit codecs, shards, and the weighted mean. No I/O, no asyncio, none of our other packages."""
