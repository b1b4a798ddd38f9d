"""Numbers only: 8-bit codecs, shards, the weighted mean. No I/O, no asyncio, none of our other packages."""
